"""What `verify MODEL` measures, keeps, and says at the next start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.bench.cases import calls, needles, texts
from agentmem.bench.verdict import interval, measure, recommended, verdict
from agentmem.model.random import random_model
from agentmem.model.verdict_file import VerdictFile
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.layouts import LAYOUTS

IDENTITY = {"weights": "a", "config": "b", "tokenizer": "c"}


def test_there_are_enough_texts_and_cases() -> None:
    """A dozen texts, and fifty cases that differ; every answer is in its prompt once."""
    asked = [*needles(36), *calls(24)]
    assert len(texts()) >= 12
    assert len({c.messages[-1]["content"] for c in asked}) >= 50
    for case in asked:
        said = " ".join(m["content"] for m in case.messages)
        assert case.tools or said.count(case.answer) == 1
        assert not case.tools or case.answer.endswith(case.arguments + "}")


@pytest.mark.slow(minutes=0.3)
@pytest.mark.parametrize("kind", [None, "window", "latent", "recurrent"])
def test_fewer_bits_cost_more(kind: str | None) -> None:
    architecture, overrides = LAYOUTS[kind] if kind else ("llama", {})
    model = random_model(architecture, seed=2, **overrides)
    result = measure(model, ["q3", "q4", "q8"], quick=True, parts=("predictions",))
    rows = {row["format"]: row for row in result["rows"]}
    assert rows["fp16"]["kl"] == 0
    if kind == "recurrent":  # nothing of it is packed
        assert rows["q3"]["kl"] == 0
        return
    assert 0 < rows["q8"]["kl"] < rows["q4"]["kl"] < rows["q3"]["kl"]
    assert rows["q3"]["bits"] < rows["q4"]["bits"] < rows["q8"]["bits"] < 16
    assert rows["q4"]["kl_interval"][0] <= rows["q4"]["kl"] <= rows["q4"]["kl_interval"][1]
    assert rows["q8"]["top1"] >= rows["q3"]["top1"]
    assert result["recommended"] == (None if kind == "latent" else "q4")
    bound = next(c for c in result["checks"] if c["name"] == "bits of an element, q4")
    assert bound["value"] == rows["q4"]["bits"]


@pytest.mark.slow(minutes=0.2)
def test_sixteen_bits_lose_nothing() -> None:
    result = measure(random_model("llama", seed=2), ["q3"], quick=True, parts=("perplexity", "cases"))
    base, three = result["rows"]
    assert base["perplexity_change"] == 0 != three["perplexity_change"]
    assert base["lost"] == []
    assert 0 <= three["argument_accuracy"] <= 1
    assert result["cases"] == 7


def test_recommended_is_the_best_of_the_small_ones() -> None:
    rows = [
        {"format": "a", "bits": 4.5, "kl": 0.2},
        {"format": "b", "bits": 3.5, "kl": 0.1},
        {"format": "c", "bits": 8.5, "kl": 0.0},
    ]
    assert recommended(rows) == "b"
    assert recommended(rows[2:]) is None


def test_an_interval_holds_the_mean_and_shrinks_with_more_texts() -> None:
    few, many = interval([0.0, 1.0]), interval([0.0, 1.0] * 50)
    assert few[0] <= 0.5 <= few[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert interval([2.0, 4.0], ratio_to=[1.0, 2.0]) == [2.0, 2.0]


def test_a_format_that_spoils_answers_is_said_to() -> None:
    sound = {"format": "q4", "kl": 0.01, "perplexity_change": 0.2, "lost": []}
    assert verdict(sound) == "ok"
    assert "diverge" in verdict(sound | {"kl": 0.4})
    assert "perplexity" in verdict(sound | {"perplexity_change": 9.0})
    assert "loses 3 cases" in verdict(sound | {"lost": ["a", "b", "c"]})


def test_verdicts_are_kept_by_model_and_format(tmp_path: Path) -> None:
    file, other = VerdictFile(tmp_path, IDENTITY), VerdictFile(tmp_path, IDENTITY | {"weights": "x"})
    assert file.verdict("q4") == "unverified"
    assert file.verdict("fp16") == "ok"
    file.write({"q4": {"verdict": "ok"}})
    file.write({"q3": {"verdict": "it loses 9 cases"}})
    assert (file.verdict("q4"), file.verdict("q3")) == ("ok", "it loses 9 cases")
    assert other.verdict("q4") == "unverified"
    for content in (b"", b"[]", b'{"formats": 3}', b"\xff"):
        file.path.write_bytes(content)
        assert file.verdict("q4") == "unverified"


def test_a_runtime_says_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama", seed=0)
    settings = Settings(home=tmp_path, ram_budget="8MiB", kv_format="q4-plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMEM_MODELS", str(tmp_path / "models"))
        for found, said in (("unverified", True), ("ok", False), ("it loses 9 cases", True)):
            if found != "unverified":
                VerdictFile(settings.paths.calibration, model.identity).write(
                    {"q4-plain": {"verdict": found}}
                )
            caplog.clear()
            runtime = Runtime.open(settings, lambda: model)
            assert runtime.health()["kv_verdict"] == found
            assert any(found in record.getMessage() for record in caplog.records) is said
            runtime.close()


@pytest.mark.slow(minutes=0.3)
def test_the_command_keeps_its_verdict(tmp_path: Path, tiny_model: Path) -> None:
    program = "from agentmem.cli.main import main; main()"
    homes = {"AGENTMEM_MODELS": str(tmp_path / "models"), "AGENTMEM_HOME": str(tmp_path)}
    env = {**homes, "PATH": "/usr/bin", "OPENBLAS_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        program,
        "verify",
        str(tiny_model),
        "--quick",
        "--formats",
        "q8",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    row = next(r for r in json.loads(done.stdout)["rows"] if r["format"] == "q8")
    kept = [json.loads(p.read_text()) for p in (tmp_path / "models" / "calibration").glob("*.verdict.json")]
    assert [k["formats"]["q8"]["verdict"] for k in kept] == [row["verdict"]]


def test_options_that_do_not_go_together_are_refused() -> None:
    program = "from agentmem.cli.main import main; main()"
    for flags, said in ((["--quick"], "need a MODEL"), (["embedded", "--deep"], "not for a model")):
        done = subprocess.run(
            [sys.executable, "-c", program, "verify", *flags],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
