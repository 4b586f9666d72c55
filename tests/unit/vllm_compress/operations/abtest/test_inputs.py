"""What `compare` refuses, and how it reads prompts and margins."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from compress_methods.errors import CompressError
from tests.unit.vllm_compress.operations.abtest.conftest import WARM_UP, Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Server
from vllm_compress.operations.abtest import comparison
from vllm_compress.operations.abtest.metrics import METRICS, read_limits
from vllm_compress.operations.abtest.probes import files
from vllm_compress.operations.abtest.replay import replay
from vllm_compress.operations.abtest.replay.prompts import digest_prompts, read_prompts
from vllm_compress.operations.journal import Journal


def test_what_cannot_be_compared_is_one_line(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    assert "http://127.0.0.1:9/v1/models: no answer" in compare.fails(a, "http://127.0.0.1:9")
    assert "x/v1/models: no answer" in compare.fails("x", b)
    said = compare.fails(a, b, "--model-b", "gpt")
    assert f"{b.url}: gpt is not served; it serves m; name one with --model-b" in said
    b.vocabulary_offset = 1
    assert "expected the same tokenizer and chat template" in compare.fails(a, b)
    assert not compare.out.exists()
    assert a.streamed() == [] or len(a.streamed()) == WARM_UP + 1
    compare.out.mkdir()
    (compare.out / "mine.txt").touch()
    assert "not empty, and not an earlier comparison" in compare.fails(a, b)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rate", "0", "--rate is 0.0, expected a number above 0"),
        ("--confidence", "1", "--confidence is 1.0, expected 0.5 to below 1"),
        ("--margin", "tttf=1", "unknown metric; did you mean 'ttft'?"),
        ("--margin", "ttft", "expected NAME=VALUE"),
        ("--margin", "ttft=fast", "expected a number or 'none'"),
        ("--margin", "length=0.9", "expected a number above 1"),
        ("--scorer", "nowhere.py:f", "nowhere.py: no such file"),
        ("--scorer", "f", "expected file.py:function"),
    ],
)
def test_options_are_checked_before_any_server_is_asked(
    compare: Compare, option: str, value: str, said: str
) -> None:
    assert said in compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", option, value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "p.jsonl:3: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl:2: expected one of prompt and"),
        ("p.jsonl", '{"prompt": 7}\n', "p.jsonl:1: prompt is 7, expected text"),
        ("p.jsonl", '{"messages": ["hello"]}\n', "p.jsonl:1: messages is not a list of objects"),
        ("p.jsonl", '{"prompt": "a", "max_tokens": 0}\n', "p.jsonl:1: max_tokens is 0"),
        ("p.jsonl", "[1]\n", "p.jsonl:1: expected an object, found list"),
        ("p.jsonl", "\n", "p.jsonl: holds no prompt"),
        ("p.txt", "good\n\n\xff\n", "p.txt:3: not UTF-8"),
        ("p.csv", "a\n", "expected .txt or .jsonl"),
    ],
)
def test_a_broken_line_of_prompts_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CompressError, match=said):
        read_prompts(tmp_path / name, 8)


def test_every_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\r\n\n  two, “quoted”\n")
    assert [p.text for p in read_prompts(path, 8)] == ["one", "  two, “quoted”"]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_the_missing_harness_is_named_before_any_server_is_asked(compare: Compare) -> None:
    said = compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", "--lm-eval", "gsm8k")
    assert "pip install 'vllm-compress[lm-eval]'" in said
    said = compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", "--lm-eval", "gsm8k:x")
    assert "'gsm8k:x', expected TASK or TASK:QUESTIONS" in said


def test_two_comparisons_do_not_write_into_one_directory(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "x") as journal:
        with pytest.raises(CompressError, match="another process is comparing into it"):
            Journal(tmp_path / "out", "x")
        journal.record("answers", 0, first="a")
    with Journal(tmp_path / "out", "x") as journal:
        assert journal.done("answers", 0)


def test_margins_lie_on_the_side_that_is_worse() -> None:
    found = read_limits(["ttft=1.1", "throughput=0.9", "score=0.05", "length=1.2", "kl=none"])
    assert found["ttft"].bounds() == (-math.inf, 1.1)
    assert found["throughput"].bounds() == (0.9, math.inf)
    assert found["score"].bounds() == (-0.05, math.inf)
    assert found["length"].bounds() == pytest.approx((1 / 1.2, 1.2))
    assert "kl" not in found
    assert found.keys() <= METRICS.keys()
    judged = {"perplexity", "kl", "score", "errors", "empty", "probes"}
    assert read_limits([]).keys() == judged


def test_the_digest_knows_every_dial_that_changes_what_is_measured(prompts: Path) -> None:
    urls, out = ("a", "b"), Path("out")
    plain = comparison.ComparisonSettings(urls, prompts, out)
    read = read_prompts(prompts, 8)
    same = [
        comparison.ComparisonSettings(
            urls, prompts, out, prices=(1, 2), margins=["kl=1"], confidence=0.9
        )
    ]
    other = [
        comparison.ComparisonSettings(("b", "a"), prompts, out),
        comparison.ComparisonSettings(urls, prompts, out, models=("m", None)),
        *(
            comparison.ComparisonSettings(urls, prompts, out, options=options)
            for options in (replay.Options(rate=1), replay.Options(logprobs=5))
        ),
    ]
    expected = comparison.digest_comparison(plain)
    assert all(comparison.digest_comparison(one) == expected for one in same)
    assert all(comparison.digest_comparison(one) != expected for one in other)
    assert digest_prompts(read_prompts(prompts, 9)) != digest_prompts(read)
    assert digest_prompts(read[1:]) != digest_prompts(read)


def test_a_probe_that_its_own_comma_cut_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "config_path", lambda _, name: tmp_path / name)
    (tmp_path / "length.yaml").write_text(
        "max_tokens: 8\nprobes: [{ask: In short, what is rain?, expect: [1, 9]}]\n"
    )
    with pytest.raises(files.ProbeError, match=r"length\.yaml: probe 1: unknown key 'what is rain"):
        files.read_probes("length")
