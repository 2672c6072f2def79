"""What the scripts in benchmarks/ count must hold, and what they time must run and agree; times are for people."""

import collections
import runpy
import sys
from pathlib import Path

import pytest
import torch

from paged_cache.bench.measuring import Wrong
from paged_cache.bench.results import Line, OtherSettingsError, Results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]  # says nothing about the installed transformers


@pytest.fixture(autouse=True, scope="module")
def _beside_the_scripts():
    """The folder of the scripts is where they find what they share."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("script", None)
    torch.set_num_threads(threads)


def load(name):
    """A script's names."""
    return runpy.run_path(str(BENCHMARKS / name))


def run(name, output, *arguments):
    """The results of a script that was run in this process."""
    load(name)["main"]([*map(str, arguments), "--threads", "1", "--output", str(output)])
    return Results.load(output)


def value(results, candidate, metric, case=0):
    """The only sample of one candidate."""
    (sample,) = results.line(results.cases()[case], candidate).metrics[metric]
    return sample


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Slots of 256 requests, and a beam search."""
    output = tmp_path_factory.mktemp("benchmarks") / "memory.json"
    shorter = ["--factor", "16", "--block-size", "4"]  # requests and blocks alike
    return run("bench_memory.py", output, *shorter, "--batches", "32", "--beams", "8", "2048", "8")


def test_few_slots_are_unused(memory):
    """With a quarter of the usual block size and of the usual lengths, less than 4 % of what requests of a trace reserve is unused, at the end and on average."""
    case = memory.cases()[0]
    paged, *padded = [line for line in memory.lines if line.case == case]

    assert case == {"requests": 256}
    assert [line.candidate for line in padded] == ["DynamicCache, batches of 32", "StaticCache, batches of 32"]
    assert value(memory, "PagedCache", "unused_percent") < 4
    assert value(memory, "PagedCache", "life_unused_percent") < 4
    for line in padded:
        assert line.metrics["used_slots"] == paged.metrics["used_slots"]
        assert line.metrics["reserved_slots"][0] > 2 * paged.metrics["reserved_slots"][0]


def test_beams_share_their_prompt(memory):
    """Eight beams never hold more than 1.1 times one prompt and their own tokens, and find what they find without us."""
    case = memory.cases()[1]
    least = "one prompt and the beams' own tokens"

    assert case == {"num_beams": 8, "prompt_len": 2048, "output_len": 8}
    assert value(memory, least, "peak_slots", 1) == 2048 + 8 * 7
    assert memory.ratio(case, "peak_slots", "PagedCache", least).max <= 1.1
    assert memory.ratio(case, "kv_bytes", "PagedCache", "DynamicCache").max < 0.2
    assert memory.line(case, "DynamicCache").note == ""
    assert [verdict.is_met for verdict in memory.verdicts()] == [True, True, True]


def test_beams_that_find_something_else_end_the_benchmark():
    """The beams of `DynamicCache` are the reference."""
    script = load("bench_memory.py")
    search = script["BeamSearch"](2, 16, 2, 16)
    answers = iter([[1, 2], [1, 3]])
    search._generate = lambda cache: (search.model(search.ids, past_key_values=cache), next(answers))[1]

    with pytest.raises(Exception, match=r"PagedCache: got \[1, 3\] instead of \[1, 2\]"):
        search.lines()


def test_requests_are_served_in_pools(tmp_path):
    """Pools hold what the requests need at a time and no more, and tables are made of runs."""
    results = run("bench_allocation.py", tmp_path / "allocation.json", "--quick", "--slots", "8")
    needed = results.details["needed"]
    plain, caching = ({name: x for name, (x,) in line.metrics.items()} for line in results.lines)

    assert results.cases() == [{"requests": 48}]
    assert results.candidates() == ["without prefix caching", "with prefix caching"]
    assert plain["num_allocated"] == caching["num_allocated"] > needed
    assert plain["blocks_per_table"] == caching["blocks_per_table"]
    for pool in (plain, caching):
        assert needed == pool["peak_blocks"] <= pool["highest_blocks"] <= pool["num_blocks"] <= 1.15 * needed
        assert 1 <= pool["blocks_per_run"] <= pool["blocks_per_table"]
        assert pool["extend_1000_blocks_us"] > 0


def test_requests_come_in_turn():
    """The trace, then the same requests in another order; each gets a slot and, but for its last token, all it asks for."""
    script = load("bench_allocation.py")
    requests = script["read_requests"](600, seed=0)
    steps = list(script["steps"](requests, 16))
    served = collections.Counter()
    for step in steps:
        served.update(step)

    assert requests[0] == (374, 44)
    assert sorted(requests[:256]) == sorted(requests[256:512])
    assert requests[:256] != requests[256:512]
    assert set(requests[512:]) <= set(requests[:256])
    assert max(map(len, steps)) == 16
    assert list(served.items()) == list(enumerate(prompt + output - 1 for prompt, output in requests))
    assert [script["count_runs"](table) for table in ([5], [1, 2, 3], [3, 2, 1], [4, 5, 9, 10, 3])] == [1, 1, 3, 3]


def test_adapters_are_served_by_everybody(tmp_path):
    """For one adapter and for three everybody has the same tokens; rounds of a second call are added."""
    output = tmp_path / "lora.json"
    first = run("bench_lora.py", output, "--quick")
    again = run("bench_lora.py", output, "--quick", "--only", "ours", "--add")
    one, three = first.cases()

    assert (one, three) == ({"adapters": 1}, {"adapters": 3})
    assert [x.candidate for x in first.lines if x.case == one] == ["groups", "mixed", "ours", "active", "base"]
    assert [x.candidate for x in first.lines if x.case == three] == ["groups", "mixed", "ours", "ours, one adapter"]
    assert not any(line.note for line in first.lines)
    assert all(len(line.metrics["elapsed_time"]) == 1 for line in first.lines)
    for line in again.lines:
        assert line.round_numbers() == ([0, 1] if line.candidate == "ours" else [0])
        assert line.metrics["elapsed_time"][0] == first.line(line.case, line.candidate).metrics["elapsed_time"][0]
    assert again.ratio(three, "elapsed_time", "ours", "mixed") == first.ratio(three, "elapsed_time", "ours", "mixed")


def test_other_settings_are_not_added(tmp_path):
    """Rounds of another workload are no further rounds."""
    output = tmp_path / "lora.json"
    run("bench_lora.py", output, "--quick", "--only", "ours")
    before = output.read_bytes()

    with pytest.raises(OtherSettingsError, match="'rank': 4"):
        run("bench_lora.py", output, "--quick", "--only", "ours", "--rank", "4", "--add")
    assert output.read_bytes() == before


def test_goals_of_adapters():
    """They are judged by ratios of single rounds, where eight adapters were measured."""
    goals = load("bench_lora.py")["GOALS"]
    rounds = [1.0, 3.0, 2.0]
    times = {"ours": 1.2, "ours, one adapter": 1.0, "mixed": 1.9}

    def judge(adapters):
        lines = [
            Line({"adapters": adapters}, name, {"elapsed_time": [x * f for x in rounds]}) for name, f in times.items()
        ]
        return list(Results("lora", "", "", {}, ours=["ours"], lines=lines, goals=goals).verdicts())

    assert [(pytest.approx(x.value), x.is_met) for x in judge(8)] == [(1.2, True), (1.2 / 1.9, False)]
    assert judge(3) == []


def test_adapters_answer_for_themselves():
    """Tokens are compared with the first ones for the same adapters only, and not at all in half precision."""
    tellers = load("bench_lora.py")["Tellers"]
    exact, loose = tellers(True), tellers(False)
    for one in (exact, loose):
        one.check((("0", "1"), [[1], [2]]), None)
        one.check((("0", "0"), [[1], [3]]), None)
    loose.check((("0", "1"), [[9], [2]]), None)

    with pytest.raises(Wrong):
        exact.check((("0", "1"), [[9], [2]]), None)


def test_host_memory_saves_computation(tmp_path):
    """Both traces have the same tokens with and without host memory, and fewer of them are computed with it."""
    results = run("bench_offload.py", tmp_path / "offload.json", "--quick")

    assert [case["trace"] for case in results.cases()] == ["preempted", "conversations"]
    assert not any(line.note for line in results.lines)
    assert value(results, "with host memory", "num_preemptions", 0) > 0
    assert sum(value(results, "with host memory", "offloaded", case) for case in (0, 1)) > 0
    assert value(results, "with host memory", "restored", 1) > 0
    assert value(results, "without", "offloaded", 1) == 0
    assert value(results, "with host memory", "num_computed", 1) < value(results, "without", "num_computed", 1)


def test_what_8_bits_cost(tmp_path):
    """It measures against itself, sees that rounding acts, and counts bytes; the figures are in docs/quantized_kv.md."""
    small = ["--windows", "2", "--length", "40", "--prompts", "2", "--prompt", "16", "--new", "8"]
    results = run("bench_quantized.py", tmp_path / "quantized_kv.json", *small)
    exact, *others = ({name: x for name, (x,) in line.metrics.items()} for line in results.lines)

    assert results.candidates() == ["float32", "bfloat16", "fp8_e4m3", "int8"]
    assert (exact["divergence"], exact["text_agreement_percent"], exact["forced_agreement_percent"]) == (0, 100, 100)
    assert exact["free_rows"] == 2
    assert all(0 < line["divergence"] < 0.1 and line["text_agreement_percent"] > 50 for line in others)
    assert [line["bytes_per_token"] / exact["bytes_per_token"] for line in others] == [1 / 2, 9 / 32, 9 / 32]


def test_all_pipelines_serve_all_prompts(tmp_path):
    """All candidates have times, ours has the reference's records, and answers have lengths of their own."""
    results = run("bench_pipeline.py", tmp_path / "pipeline.json", "--quick")

    assert results.cases() == [{"prompts": 8}]
    assert results.candidates() == ["batch_size=1", "batch_size=8", "batch_size=32", "paged"]
    assert all(line.metrics["elapsed_time"][0] > 0 for line in results.lines)
    assert 16 < results.details["tokens"] / 2 < 8 * 12  # served twice, the first time untimed


def test_wrong_records_are_found():
    """Whoever gives other records is refused with their number."""
    check = load("bench_pipeline.py")["require_equal"]
    check([[1], [2]], [[1], [2]])

    with pytest.raises(Wrong, match="1 of 2 records are those of batch_size=1"):
        check([[1], [3]], [[1], [2]])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        check([[1]], [[1], [2]])


def test_prompts_have_the_lengths_of_the_trace():
    """Pieces of one text, from the same seed the same ones."""
    script = load("bench_pipeline.py")
    tokenizer = script["AutoTokenizer"].from_pretrained(script["MODEL_PATH"])
    prompts = script["make_prompts"](tokenizer, 20, 10.0, seed=1)
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]

    assert prompts == script["make_prompts"](tokenizer, 20, 10.0, seed=1)
    assert prompts != script["make_prompts"](tokenizer, 20, 10.0, seed=2)
    assert lengths[0] == pytest.approx(37, abs=3)
    assert len(set(lengths)) > 10


def test_quick_runs_write_nothing(monkeypatch, capsys):
    """Without --output a smoke test leaves the committed numbers alone, and shows its tables."""
    script = load("bench_allocation.py")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Results, "save", lambda *_: pytest.fail("written"))
    script["main"](["--quick", "--requests", "3"])

    shown = capsys.readouterr().out
    assert "blocks per run" in " ".join(shown.split())
    assert "written" not in shown


def test_add_wants_a_file(capsys):
    """A smoke test has no file to which rounds could be added."""
    with pytest.raises(SystemExit):
        load("bench_allocation.py")["main"](["--quick", "--add"])
    assert "--output" in capsys.readouterr().err
