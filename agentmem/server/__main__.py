"""`python -m agentmem.server`: the daemon in the foreground.

Prints `agentmem ready URL` on stdout when it serves. Exit status: 0 after a clean stop, 1 failure, 2 usage,
5 refused (another daemon holds the home, or a policy forbids it).
"""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from contextlib import closing
from types import FrameType

import uvicorn
from pydantic import ValidationError

from agentmem import __version__
from agentmem.api.service import Service
from agentmem.daemon import DaemonRecord
from agentmem.errors import AgentMemError, AlreadyRunning, Forbidden
from agentmem.server.app import create_app
from agentmem.server.connection import connection_class
from agentmem.server.life import bind, held, listen, local, url_of
from agentmem.server.tokens import Tokens
from agentmem.settings import Settings

log = logging.getLogger("agentmem")

FAILURE, USAGE, REFUSED = 1, 2, 5
GRACE_S = 10
KEEP_CONNECTION_S = 75


class Server(uvicorn.Server):
    """Says where it serves, in the home and on stdout, as soon as it does."""

    def __init__(self, config: uvicorn.Config, service: Service, record: DaemonRecord) -> None:
        super().__init__(config)
        self._service = service
        self._record = record

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._record.write(self._service.settings.paths)
            print(f"agentmem ready {self._record.url}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.wind_up()
        await super().shutdown(sockets)


class Interrupted(BaseException):
    """A signal came before the daemon was ready."""


class Stop:
    """SIGTERM and SIGINT until the server has taken them over, and after it gave them back."""

    def __init__(self) -> None:
        self.at_once = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise Interrupted


def _announce(stage: str, fraction: float | None) -> None:
    """A line that `up` and `demo` show as progress."""
    print(f"agentmem progress {fraction or 0.0:.3f} {stage}", flush=True)


def serve(settings: Settings) -> None:
    """Run until a signal. Raises AgentMemError when it cannot start, Interrupted when a signal came first."""
    stop = Stop()
    with held(settings.paths), closing(bind(settings)) as listener, local(settings.paths) as neighbour:
        tokens = Tokens(settings.paths)
        # Imported here: loading MLX takes longer than finding out that this start must be refused.
        from agentmem.runtime import Runtime

        log.info("loading the model %s", settings.model)
        with (
            closing(Runtime.open(settings, progress=_announce)) as runtime,
            closing(Service(runtime, settings)) as service,
        ):
            gc.freeze()  # a full collection would walk the whole memory, between two tokens
            stop.at_once = False
            record = DaemonRecord(
                pid=os.getpid(),
                url=url_of(listener),
                port=listener.getsockname()[1],
                model=runtime.model_name,
                version=__version__,
                home=str(settings.home),
                started=time.time(),
                socket=None if neighbour is None else neighbour.getsockname(),
            )
            listeners = [listener] if neighbour is None else [listener, neighbour]
            for each in listeners:
                listen(each)
            config = uvicorn.Config(
                create_app(service, tokens),
                http=connection_class(settings.receive_timeout_s),
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=settings.log_level == "debug",
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=KEEP_CONNECTION_S,
                timeout_graceful_shutdown=GRACE_S,
            )
            Server(config, service, record).run(sockets=listeners)
            log.info("stopping")


def arguments() -> argparse.ArgumentParser:
    """One flag per setting."""
    parser = argparse.ArgumentParser(prog="agentmem serve", argument_default=argparse.SUPPRESS)
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.is_required() or field.default_factory else f" (default: {field.default})"
        text = ((field.description or "") + default).strip().replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif field.annotation == list[str]:
            parser.add_argument(flag, action="append", metavar="TEXT", help=text)
        else:
            parser.add_argument(flag, metavar="VALUE", help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    flags = vars(arguments().parse_args(argv))
    try:
        settings = Settings(**flags)
    except (ValidationError, ValueError) as error:
        print(f"agentmem: {_first_problem(error)}", file=sys.stderr)
        return USAGE
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        serve(settings)
    except Interrupted:
        return 0
    except (AlreadyRunning, Forbidden) as error:
        print(f"agentmem: {error.message}", file=sys.stderr)
        return REFUSED
    except AgentMemError as error:
        print(f"agentmem: {error.message}", file=sys.stderr)
        return FAILURE
    except OSError as error:
        print(f"agentmem: {settings.home} cannot be used: {_why_not(error)}", file=sys.stderr)
        return FAILURE
    return 0


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}"
    return str(error)


def _why_not(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room and start again"
    return str(error)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # Everything is closed and on disk; the destructors of MLX's threads sometimes abort the process.
    os._exit(status)
