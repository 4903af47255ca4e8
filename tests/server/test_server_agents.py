"""The routes of named agents, store and metrics."""

from __future__ import annotations

STORY = "The gardener writes the name of each seed on a small stone and lays it on the wall. " * 2
FIELDS = {
    "agent", "namespace", "model", "state", "sessions", "tokens", "turns", "ram_bytes", "disk_bytes",
    "unique_bytes", "shared_bytes", "fp16_bytes", "prompt_tokens", "cached_tokens", "saved_ms", "created", "last_used",
    "pinned", "keep_until", "persist", "reuse", "planner", "policy", "quota_bytes", "encrypted", "locked",
    "lineage",
}  # fmt: skip


def test_a_turn_makes_an_agent(daemon, record) -> None:
    usage = daemon.chat("gardener", STORY)["usage"]
    shown = daemon.http.get("/v1/agents/gardener").json()
    assert set(shown) == FIELDS
    assert shown["model"] == record["model"]
    assert shown["state"] == "hot"
    assert shown["turns"] == 1
    assert shown["tokens"] >= usage["total_tokens"] - 1
    assert shown["disk_bytes"] > 0
    assert shown["fp16_bytes"] > 0
    listed = daemon.http.get("/v1/agents").json()
    assert listed["object"] == "list"
    assert shown["agent"] in [agent["agent"] for agent in listed["data"]]


def test_evict_and_warm(daemon) -> None:
    text = f"Alone: {STORY}"  # pages that another agent uses would stay in RAM
    reply = daemon.chat("sleeper", text)["choices"][0]["message"]["content"]
    evicted = daemon.http.post("/v1/agents/sleeper/evict").json()
    assert (evicted["state"], evicted["ram_bytes"]) == ("warm", 0)
    warmed = daemon.http.post("/v1/agents/sleeper/warm", json={}).json()
    assert warmed["state"] == "hot"
    assert warmed["ram_bytes"] > 0
    daemon.http.post("/v1/agents/sleeper/evict")
    usage = daemon.chat("sleeper", text, reply, "Which stone?")["usage"]
    assert usage["agentmem"]["state_before"] == "warm"
    assert usage["agentmem"]["restored_tokens"] > 0


def test_equal_turns_of_many_agents_are_all_kept(daemon) -> None:
    for agent in ("first", "second", "third"):
        usage = daemon.chat(agent, STORY + " All say the same.", temperature=0)["usage"]
        assert usage["agentmem"]["committed"] is True
    assert daemon.http.get("/health").json()["status"] == "ok"


def test_append_is_read_before_it_is_asked(daemon) -> None:
    room = {"params": {"namespace": "reader"}}
    usage = daemon.http.post(
        "/v1/agents/reader/append", json={"text": STORY, "role": "system"}, **room
    ).json()
    assert usage["completion_tokens"] == 0
    assert usage["agentmem"]["prefilled_tokens"] == usage["prompt_tokens"]
    more = {"messages": [{"role": "user", "content": "Where are the stones?"}], "session": "default"}
    assert daemon.http.post("/v1/agents/reader/append", json=more, **room).status_code == 200
    who = {"agent": "reader", "namespace": "reader", "history": "server"}
    answer = daemon.chat("reader", "Say it.", agentmem=who)["usage"]
    assert answer["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"]


def test_forget_is_for_good(daemon) -> None:
    daemon.chat("gone", STORY + " Only this one remembers.")
    forgotten = daemon.http.delete("/v1/agents/gone").json()
    assert forgotten["agent"] == "gone"
    assert forgotten["deleted"] is True
    assert forgotten["bytes_freed"] > 0
    assert daemon.http.get("/v1/agents/gone").status_code == 404
    assert daemon.http.delete("/v1/agents/gone").status_code == 404


def test_one_session_is_forgotten_with_what_its_responses_kept(daemon, record) -> None:
    asked = {"model": record["model"], "input": f"In its own session: {STORY}", "max_output_tokens": 4}
    kept = daemon.http.post("/v1/responses", json=asked | {"agentmem": {"agent": "two"}}).json()
    (own,) = daemon.http.get("/v1/agents/two").json()["sessions"]
    daemon.chat("two", STORY, agentmem={"agent": "two", "session": "stays"})
    forgotten = daemon.http.delete(f"/v1/agents/two/sessions/{own}").json()
    assert (forgotten["agent"], forgotten["session"], forgotten["deleted"]) == ("two", own, True)
    assert forgotten["bytes_freed"] > 0
    assert daemon.http.get("/v1/agents/two").json()["sessions"] == ["stays"]
    assert daemon.http.get(f"/v1/responses/{kept['id']}").status_code == 404
    again = daemon.http.delete(f"/v1/agents/two/sessions/{own}")
    assert again.status_code == 404
    assert f"no session '{own}'" in again.json()["error"]["message"]
    assert daemon.http.delete("/v1/agents/nobody/sessions/goes").status_code == 404
    assert daemon.http.delete("/v1/agents/two/sessions/a%23b").status_code == 400


def test_namespaces_do_not_see_each_other(daemon) -> None:
    text = STORY + " In another room."
    daemon.chat("twin", text, agentmem={"agent": "twin", "namespace": "left"})
    assert daemon.http.get("/v1/agents/twin").status_code == 404
    assert daemon.http.get("/v1/agents/twin", params={"namespace": "left"}).status_code == 200
    names = [a["agent"] for a in daemon.http.get("/v1/agents", params={"namespace": "left"}).json()["data"]]
    assert names == ["twin"]
    usage = daemon.chat("twin", text, agentmem={"agent": "twin", "namespace": "right"})["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert daemon.http.get("/v1/agents", params={"namespace": "../x"}).status_code == 400


def test_explain_names_the_agent_and_its_source(daemon) -> None:
    daemon.chat("explained", "Hello.", agentmem=None, prompt_cache_key="explained/t-9")
    facts = daemon.http.get("/v1/agents/explained/explain", params={"session": "t-9"}).json()
    assert facts["agent"] == "explained"
    assert "prompt_cache_key" in str(facts)


def test_store_and_metrics_count_what_happened(daemon) -> None:
    names = {
        "queries": "agentmem_prefix_cache_queries_total",
        "hits": "agentmem_prefix_cache_hits_total",
        "prefilled": "agentmem_prefilled_tokens_total",
        "generated": "agentmem_generated_tokens_total",
        "spoken": "agentmem_time_to_first_token_seconds_count",
        "committed": "agentmem_committed_bytes_total",
        "requests": 'agentmem_http_requests_total{route="/v1/chat/completions",status="200"}',
    }
    before = {key: daemon.metric(name) for key, name in names.items()}
    usage = daemon.chat("measured", STORY + " It is measured.")["usage"]
    grown = {key: daemon.metric(name) - before[key] for key, name in names.items()}
    assert grown["queries"] == usage["prompt_tokens"]
    assert grown["hits"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown["prefilled"] == usage["agentmem"]["prefilled_tokens"]
    assert grown["generated"] == usage["completion_tokens"]
    assert grown["spoken"] == grown["requests"] == 1
    assert grown["committed"] == usage["agentmem"]["bytes_written"] > 0
    store = daemon.http.get("/v1/store").json()
    assert daemon.metric("agentmem_store_ram_used_bytes") == store["ram"]["used_bytes"] > 0
    assert daemon.metric("agentmem_turns_waiting") == 0
