"""Settings of the daemon. Precedence: arguments > `AGENTMEM_*` environment > `config.toml` in the home > defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, field_validator
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
    queue_limit: int = Field(default=64, ge=1)
    open_inference: bool = Field(
        default=False, description="let inference through without a token on loopback"
    )
    allow_remote: bool = Field(default=False, description="allow a bind address that is not loopback")
    allowed_hosts: list[str] = Field(default_factory=list)
    allowed_origins: list[str] = Field(default_factory=list)
    max_body: ByteSize = Field(default=ByteSize(64 << 20))
    max_import: ByteSize = Field(default=ByteSize(16 << 30), description="bytes of a file to import")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

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
