"""Encryption at rest: a key for every sealed space, and what is sealed with it.

AES-256-GCM throughout. A *vault* is one key; it belongs to one space, whose name ends in its id: `namespace!id`. The id's first
letter says where the key is: `f` a file of the home, `k` the system's keychain. Dropping the key makes everything that was sealed
with it unreadable, copies and leftover disk blocks too.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agentmem.errors import StoreError

MARK = "!"
KEY_BYTES = 32
TAG_BYTES = 16
NONCE_BYTES = 12
SERVICE = "agentmem"
VAULT = re.compile(r"[fk][0-9a-f]{16}")

Where = Literal["file", "keyring"]


class Locked(Exception):
    """The key is not there, or it is not the one that sealed this."""


def vault_of(space: str) -> str | None:
    """The id of the vault that seals a space; None for a space in plain text."""
    _, mark, vault = space.partition(MARK)
    return vault if mark else None


def _derived(key: bytes, salt: bytes, info: bytes) -> AESGCM:
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key))


class Stream:
    """The pieces of one extent, numbered; a key of its own makes the numbers safe as nonces."""

    def __init__(self, cipher: AESGCM, bound: bytes) -> None:
        self._cipher, self._bound = cipher, bound

    def seal(self, number: int, data: bytes | memoryview) -> tuple[bytes, bytes]:
        """(ciphertext, tag) of piece `number`. Each number may be used once."""
        sealed = self._cipher.encrypt(number.to_bytes(NONCE_BYTES, "big"), data, self._bound)
        return sealed[:-TAG_BYTES], sealed[-TAG_BYTES:]

    def open(self, number: int, data: bytes | bytearray | memoryview, tag: bytes) -> bytes:
        """The plain text of piece `number`; raises Locked when it is not what was sealed."""
        try:
            return self._cipher.decrypt(number.to_bytes(NONCE_BYTES, "big"), bytes(data) + tag, self._bound)
        except InvalidTag:
            raise Locked("the key does not open this, or it was altered") from None


class Seal:
    """One vault's key at work. Safe from any thread."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self._rows = _derived(key, b"", b"agentmem rows 1")

    def seal(self, data: bytes, what: bytes) -> bytes:
        """`data` as a value of the index; `what` says which kind of value it is and must be the same to open it."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._rows.encrypt(nonce, data, what)

    def open(self, sealed: bytes, what: bytes) -> bytes:
        """The inverse; raises Locked."""
        try:
            return self._rows.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], what)
        except (InvalidTag, ValueError):
            raise Locked("the key does not open this, or it was altered") from None

    def stream(self, nonce: bytes, bound: bytes) -> Stream:
        """For the pieces of one extent. `nonce` is random, `bound` everything that must not change around the pieces."""
        cipher = _derived(self._key, nonce, b"agentmem extent 1")
        return Stream(cipher, hashlib.sha256(bound).digest())


class Keychain(Protocol):
    """Where keys are kept."""

    def put(self, vault: str, key: bytes) -> None: ...

    def get(self, vault: str) -> bytes | None: ...

    def drop(self, vault: str) -> None: ...


class KeyFiles:
    """One file per key, 0600, in a folder 0700. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, vault: str, key: bytes) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._folder / vault, flags, 0o600)
        try:
            os.write(fd, key)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._sync()

    def get(self, vault: str) -> bytes | None:
        try:
            fd = os.open(self._folder / vault, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, KEY_BYTES + 1)
        finally:
            os.close(fd)

    def drop(self, vault: str) -> None:
        """Overwrite the key where it lies, as far as the file system does that, and unlink it."""
        try:
            fd = os.open(self._folder / vault, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.write(fd, secrets.token_bytes(KEY_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.unlink(self._folder / vault)
        self._sync()

    def _sync(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class SystemKeychain:
    """The keychain of the system, through the package `keyring`. Raises StoreError when there is none."""

    def put(self, vault: str, key: bytes) -> None:
        self._ask(lambda k: k.set_password(SERVICE, vault, key.hex()))

    def get(self, vault: str) -> bytes | None:
        text = self._ask(lambda k: k.get_password(SERVICE, vault))
        try:
            return bytes.fromhex(text) if isinstance(text, str) else None
        except ValueError:
            return None

    def drop(self, vault: str) -> None:
        if self.get(vault) is not None:
            self._ask(lambda k: k.delete_password(SERVICE, vault))

    @staticmethod
    def _ask(question: Callable[[Keyring], object]) -> object:
        try:
            import keyring
            import keyring.errors
        except ImportError:
            raise StoreError(
                "encrypt 'keyring' needs the package keyring; install it, or set encrypt to 'file'"
            ) from None
        try:
            return question(keyring)
        except keyring.errors.KeyringError as error:
            raise StoreError(
                f"the system's keychain does not answer ({error}); unlock it, or set encrypt to 'file'"
            ) from error


class Keyring(Protocol):
    """What is used of the module `keyring`."""

    def set_password(self, service_name: str, username: str, password: str) -> None: ...

    def get_password(self, service_name: str, username: str) -> str | None: ...

    def delete_password(self, service_name: str, username: str) -> None: ...


class Vaults:
    """All keys of one home. Safe from any thread."""

    def __init__(self, folder: Path) -> None:
        self._keychains: dict[str, Keychain] = {"f": KeyFiles(folder), "k": SystemKeychain()}
        self._seals: dict[str, Seal] = {}
        self._fresh: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def make(self, namespace: str, where: Where) -> str:
        """A new space of a namespace with a new key, which is kept from its first use on.

        Raises OSError or StoreError when the place for keys does not answer.
        """
        vault = where[0] + secrets.token_hex(8)
        self._keychains[where[0]].get(vault)
        with self._lock:
            self._fresh[vault] = secrets.token_bytes(KEY_BYTES)
        return f"{namespace}{MARK}{vault}"

    def seal(self, space: str) -> Seal | None:
        """What seals a space, or None for one in plain text. The key of a new space is durable when this returns.

        Raises Locked when its key is not there, OSError or StoreError when a new one cannot be kept.
        """
        vault = vault_of(space)
        if vault is None:
            return None
        self.keep(space)
        with self._lock:
            if vault not in self._seals:
                self._seals[vault] = Seal(self._key(vault))
            return self._seals[vault]

    def keep(self, space: str) -> None:
        """Make the key of a space durable, where it is new. Raises OSError or StoreError when it cannot be kept."""
        vault = vault_of(space) or ""
        with self._lock:
            if vault in self._fresh:
                self._keychains[vault[0]].put(vault, self._fresh[vault])
                self._seals[vault] = Seal(self._fresh.pop(vault))

    def _key(self, vault: str) -> bytes:
        if not _ours(vault):
            raise Locked(f"{vault!r} is no vault of ours")
        try:
            key = self._keychains[vault[0]].get(vault)
        except (OSError, StoreError) as error:
            raise Locked(f"the key of vault {vault} cannot be read: {error}") from error
        if key is None or len(key) != KEY_BYTES:
            raise Locked(f"the key of vault {vault} is {'missing' if key is None else 'damaged'}")
        return key

    def drop(self, space: str) -> None:
        """Destroy a space's key. Raises OSError or StoreError when that fails."""
        vault = vault_of(space)
        if vault is None or not _ours(vault):
            return
        with self._lock:
            self._seals.pop(vault, None)
            if self._fresh.pop(vault, None) is None:
                self._keychains[vault[0]].drop(vault)


def _ours(vault: str) -> bool:
    return VAULT.fullmatch(vault) is not None
