"""A coding tool's private profile: files and an environment that lead it to the daemon, and touch nothing of the person's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agentmem.errors import Forbidden
from agentmem.home import Home, private

TOKEN_VARIABLE = "AGENTMEM_INFERENCE_TOKEN"
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Profile:
    """`files` by name, below `folder`. `secret` names the variable of the environment that holds the token."""

    folder: Path
    secret: str
    environment: dict[str, str]
    without: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Put the files into the folder (0700), each in one step. Raises Forbidden for a folder that is a link."""
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink() or not folder.is_dir():
                raise Forbidden(f"{folder} is not a plain folder")
            folder.chmod(0o700)
        for name, text in self.files.items():
            temporary = self.folder / f".{name}.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                with open(temporary, "x", encoding="utf-8", opener=private) as file:
                    file.write(text)
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)

    def applied(self, base: Mapping[str, str], token: str) -> dict[str, str]:
        """The environment of the tool. A proxy of `base` must not see what goes to this machine, nor the token."""
        kept = {name: value for name, value in base.items() if name not in self.without}
        bypass = {name: ",".join(filter(None, (kept.get(name), *LOCAL))) for name in ("NO_PROXY", "no_proxy")}
        return {**kept, **bypass, **self.environment, self.secret: token}


def claude(folder: Path, url: str, model: str) -> Profile:
    names = ("", "_DEFAULT_OPUS", "_DEFAULT_SONNET", "_DEFAULT_HAIKU")
    return Profile(
        folder,
        "ANTHROPIC_AUTH_TOKEN",
        {
            "ANTHROPIC_BASE_URL": url,
            # It asks models of several sizes by name; here there is one.
            **{f"ANTHROPIC{name}_MODEL": model for name in names},
            "CLAUDE_CONFIG_DIR": str(folder),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        # Each of these would win over the address above.
        ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX"),
    )


def codex(folder: Path, url: str, model: str) -> Profile:
    # A JSON string is a TOML string, too.
    config = "\n".join(
        [
            f"model = {json.dumps(model)}",
            'model_provider = "agentmem"',
            "",
            "[model_providers.agentmem]",
            'name = "agentmem"',
            f"base_url = {json.dumps(f'{url}/v1')}",
            f"env_key = {json.dumps(TOKEN_VARIABLE)}",
            'wire_api = "responses"',
            "",
        ]
    )
    return Profile(folder, TOKEN_VARIABLE, {"CODEX_HOME": str(folder)}, files={"config.toml": config})


def opencode(folder: Path, url: str, model: str) -> Profile:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "agentmem",
        "options": {"baseURL": f"{url}/v1", "apiKey": f"{{env:{TOKEN_VARIABLE}}}"},
        "models": {model: {"name": model}},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"agentmem": provider},
        "model": f"agentmem/{model}",
    }
    path = folder / "opencode.json"
    text = json.dumps(config, indent=2) + "\n"
    return Profile(folder, TOKEN_VARIABLE, {"OPENCODE_CONFIG": str(path)}, files={path.name: text})


TOOLS: dict[str, Callable[[Path, str, str], Profile]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
}


def profile_of(tool: str, home: Home, url: str, model: str) -> Profile:
    """The profile of a tool in `TOOLS`, for the daemon at `url` that serves `model`. Nothing is written yet."""
    return TOOLS[tool](home.root / "launch" / tool, url, model)
