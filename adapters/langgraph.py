"""LangGraph's checkpoints, with the daemon's memory beside them: `AgentMemSaver`."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)

from agentmem.adapters.threads import Threads


class AgentMemSaver(BaseCheckpointSaver[Any]):
    """Any checkpoint saver; what happens to a thread happens to its agents' memory too.

    `copy_thread` forks the memory of each agent of the thread, under the name `agent@target`, and also copies for
    savers that cannot by themselves. `delete_thread` forgets the agents that speak in no other thread, and raises
    DaemonNotRunning before anything is deleted. All else goes to `saver`.
    """

    def __init__(
        self,
        saver: BaseCheckpointSaver[Any],
        *,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
    ) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver
        self._threads = Threads(url, token, home)

    def __getattr__(self, name: str) -> Any:
        """What the saver has of its own, such as `setup`."""
        if name == "saver":
            raise AttributeError(name)
        return getattr(self.saver, name)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        try:
            self.saver.copy_thread(source_thread_id, target_thread_id)
        except NotImplementedError:
            self._copy(source_thread_id, target_thread_id)
        self._threads.fork(source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        try:
            await self.saver.acopy_thread(source_thread_id, target_thread_id)
        except NotImplementedError:
            await self._acopy(source_thread_id, target_thread_id)
        await self._threads.afork(source_thread_id, target_thread_id)

    def delete_thread(self, thread_id: str) -> None:
        self._threads.forget(thread_id)
        self.saver.delete_thread(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        await self._threads.aforget(thread_id)
        await self.saver.adelete_thread(thread_id)

    def _copy(self, source: str, target: str) -> None:
        for found in reversed(list(self.saver.list(_thread(source)))):
            place = self.saver.put(
                _parent(found, target), found.checkpoint, found.metadata, _versions(found.checkpoint)
            )
            for task, writes in _writes(found).items():
                self.saver.put_writes(place, writes, task)

    async def _acopy(self, source: str, target: str) -> None:
        found_all = [found async for found in self.saver.alist(_thread(source))]
        for found in reversed(found_all):
            place = await self.saver.aput(
                _parent(found, target), found.checkpoint, found.metadata, _versions(found.checkpoint)
            )
            for task, writes in _writes(found).items():
                await self.saver.aput_writes(place, writes, task)

    @property
    def config_specs(self) -> Any:
        return self.saver.config_specs

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> AgentMemSaver:
        allowed = copy.copy(self)
        allowed.saver = self.saver.with_allowlist(extra_allowlist)
        allowed.serde = allowed.saver.serde
        return allowed

    def get_next_version(self, current: Any, channel: None) -> Any:
        return self.saver.get_next_version(current, channel)

    def get(self, config: RunnableConfig) -> Checkpoint | None:
        return self.saver.get(config)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self.saver.get_tuple(config)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        return self.saver.list(config, filter=filter, before=before, limit=limit)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return self.saver.put(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        self.saver.put_writes(config, writes, task_id, task_path)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        self.saver.delete_for_runs(run_ids)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self.saver.prune(thread_ids, strategy=strategy)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return self.saver.get_delta_channel_history(config=config, channels=channels)

    async def aget(self, config: RunnableConfig) -> Checkpoint | None:
        return await self.saver.aget(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await self.saver.aget_tuple(config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        async for found in self.saver.alist(config, filter=filter, before=before, limit=limit):
            yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await self.saver.aput(config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await self.saver.aput_writes(config, writes, task_id, task_path)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await self.saver.adelete_for_runs(run_ids)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await self.saver.aprune(thread_ids, strategy=strategy)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self.saver.aget_delta_channel_history(config=config, channels=channels)


def _thread(thread: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread}}


def _parent(found: CheckpointTuple, thread: str) -> RunnableConfig:
    """Where a checkpoint goes in another thread: behind its parent."""
    before = found.parent_config["configurable"]["checkpoint_id"] if found.parent_config else None
    space = found.config["configurable"].get("checkpoint_ns", "")
    return {"configurable": {"thread_id": thread, "checkpoint_ns": space, "checkpoint_id": before}}


def _versions(checkpoint: Checkpoint) -> ChannelVersions:
    """Every channel counts as new: the other thread has none of them yet."""
    return dict(checkpoint["channel_versions"])


def _writes(found: CheckpointTuple) -> dict[str, list[tuple[str, Any]]]:
    """The writes of each task, in their order: savers count them within a task."""
    tasks: dict[str, list[tuple[str, Any]]] = {}
    for task, channel, value in found.pending_writes or []:
        tasks.setdefault(task, []).append((channel, value))
    return tasks
