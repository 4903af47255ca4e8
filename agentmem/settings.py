"""Settings of the daemon. Precedence: arguments > `AGENTMEM_*` environment > `config.toml` in the home > defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, TypeAdapter, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from agentmem.home import Home, default_home


class Settings(BaseSettings):
    """What a person may set. Byte sizes take `512MiB`, `4GB` or a plain number."""

    model_config = SettingsConfigDict(env_prefix="AGENTMEM_", extra="ignore")

    home: Path = Field(default_factory=default_home)
    host: str = "127.0.0.1"
    port: int = Field(default=8377, ge=0, le=65535)
    model: str = "embedded"
    kv_format: str = "q4"
    page_tokens: int = Field(default=64, ge=16, le=256)
    chunk_tokens: int = Field(default=512, ge=16, le=8192)
    ram_budget: ByteSize = Field(default=ByteSize(1 << 30), description="bytes of KV state kept in RAM")
    disk_budget: ByteSize | None = Field(
        default=ByteSize(50 << 30), description="bytes that the store may take on disk"
    )
    disk_floor: ByteSize = Field(default=ByteSize(1 << 30), description="bytes that stay free on the disk")
    agent_quota: ByteSize | None = Field(default=None, description="bytes of one agent's state on disk")
    namespace_quota: ByteSize | None = Field(default=None, description="bytes of a namespace's state on disk")
    half_life_hours: float = Field(
        default=72.0, gt=0, description="hours without use after which state counts half when room is needed"
    )
    compose_budget: ByteSize = Field(
        default=ByteSize(256 << 20),
        ge=0,
        description="bytes of segments and anchors for composed reuse, in RAM and again on disk",
    )
    compose_anchors: Literal["decayed", "paper"] = Field(
        default="decayed",
        description="how anchors are kept: what served least goes; or as KVCOMM has it, whole and in a window, for planner paper",
    )
    episode_encoder: str = Field(
        default="minilm",
        description="what tells the episodes of a long life apart: minilm, hash512, a folder, or org/name",
    )
    scrub_mb_s: float = Field(
        default=4.0, ge=0, description="megabytes per second that are read again in idle time; 0: none"
    )
    max_context: int | None = Field(default=None, ge=64, description="tokens; default: the model's own")
    max_reply: int = Field(
        default=1024, ge=1, description="tokens of a reply when the request names no limit"
    )
    encrypt: Literal["off", "file", "keyring"] = Field(
        default="off",
        description="seal what new agents leave on disk; their keys are files of the home or in the keychain",
    )
    commit: Literal["full", "batched", "none"] = "full"
    queue_limit: int = Field(default=64, ge=1, description="requests that may wait for their turn")
    max_wait_s: float = Field(
        default=600.0, gt=0, description="predicted seconds of waiting from which on a request is turned away"
    )
    max_batch: int = Field(default=16, ge=1, le=256, description="requests that run side by side")
    itl_target_ms: float = Field(
        default=100.0, gt=0, description="milliseconds between two tokens of a reply while prompts are read"
    )
    memory_limit: str = Field(
        default="90%", description="memory of the device that may be used: bytes, or a share of it"
    )
    open_inference: bool = Field(
        default=False, description="let inference through without a token on loopback"
    )
    allow_remote: bool = Field(default=False, description="allow a bind address that is not loopback")
    allowed_hosts: list[str] = Field(default_factory=list)
    allowed_origins: list[str] = Field(default_factory=list)
    max_body: ByteSize = Field(default=ByteSize(64 << 20))
    max_import: ByteSize = Field(default=ByteSize(16 << 30), description="bytes of a file to import")
    receive_timeout_s: float = Field(
        default=60.0, gt=0, description="seconds within which the head of a request must arrive, and its body"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("memory_limit")
    @classmethod
    def _memory(cls, value: str) -> str:
        _share_or_bytes(value)
        return value

    def memory_bytes(self, device: int) -> int:
        """`memory_limit` in bytes, of a device that has `device` bytes."""
        share, size = _share_or_bytes(self.memory_limit)
        return int(share * device) if share is not None else size

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The TOML file lies in the home that the arguments or the environment name."""
        named = init_settings().get("home")
        home = Path(named).expanduser() if named else default_home()
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Home(home).config)

    @property
    def paths(self) -> Home:
        return Home(self.home)


def _share_or_bytes(text: str) -> tuple[float | None, int]:
    """A share of the device's memory, or bytes. Raises ValueError."""
    if not text.endswith("%"):
        return None, int(TypeAdapter(ByteSize).validate_python(text))
    share = float(text.removesuffix("%")) / 100
    if not 0 < share <= 1:
        raise ValueError(f"a share of the memory lies between 0% and 100%; got {text}")
    return share, 0
