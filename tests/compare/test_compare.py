"""`paged-cache compare`, as a user runs it: its numbers, its files, and what it says when something is wrong."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from paged_cache.bench.measuring import Sample
from paged_cache.bench.results import Line, Results
from paged_cache.bench.serving.peers import GENERATE_BATCH
from paged_cache.bench.workload import Workload
from paged_cache.cli import app
from paged_cache.cli.compare import numbers, read_prompts
from paged_cache.compare import caches, concurrency, report
from paged_cache.compare.caches import Alone, Dynamic, NoCache, Paged, Static
from paged_cache.compare.concurrency import Live, Threads
from paged_cache.compare.findings import QUICK, findings
from paged_cache.compare.measuring import OURS, SECTIONS, Comparison, Phase, faults, part, section
from paged_cache.compare.page import origin, save_html
from paged_cache.compare.panels import PANELS, draw
from paged_cache.compare.report import ratio_grid
from paged_cache.compare.settings import Settings, make_settings
from paged_cache.compare.subject import Subject, load_subject
from paged_cache.compare.texts import Texts, spread
from paged_cache.errors import InvalidRequestError
from tests import models

CACHES = ["no KV cache", "DynamicCache", "StaticCache", "PagedCache"]
SERVERS = ["one by one", "generate in threads", "one padded batch", *GENERATE_BATCH, "ContinuousBatcher"]
SMALL = ("--quick", "--no-concurrency", "--batch-size", 2, "--contexts", 16, "--max-new-tokens", 4)


def run(*arguments):
    """The command with these arguments, in this process, on a wide terminal."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "160"})


def folder_of(kind, tmp_path):
    """A folder with a tiny model of this kind, and no tokenizer."""
    models.model(kind).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def subject(kind, lengths, **chosen):
    """A tiny model with prompts of these lengths."""
    settings = make_settings(quick=True, **chosen)
    model, vocab = models.model(kind), models.model(kind).config.vocab_size
    rows = [[10 + (7 * i + j) % (vocab - 20) for j in range(length)] for i, length in enumerate(lengths)]
    return Subject(model, settings, Texts(None, model.config, settings), rows, None)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Where the command leaves its files."""
    return tmp_path_factory.mktemp("compare") / "out"


@pytest.fixture(scope="module")
def shown(output):
    """What `paged-cache compare --quick` shows on the package's model."""
    result = run("--quick", "--output", output)

    assert result.exit_code == 0, result.output
    return result.output


def test_the_screen_has_everything(shown):
    """Each part has its table, with all candidates; sentences say what was found, and where the files are."""
    for name in [
        *CACHES,
        *SERVERS,
        "One batch, each cache: time",
        "One batch, each cache: memory",
        "One prompt of each length",
        "Many requests",
        "mean TPOT, ms",
        "wasted",
        "KV allocated",
        "peak KV in use",
        "E2EL: to the last one",
    ]:
        assert name in shown
    assert "All tokens of PagedCache and ContinuousBatcher are those of DynamicCache" in shown
    assert shown.index("What was found") < shown.index("One batch") < shown.index("Many requests")
    assert len(shown.splitlines()) < 70
    assert all(f"compare.{suffix}" in shown for suffix in ("json", "png", "html"))


def test_quick_figures_say_nothing(shown, output):
    """One sentence says so instead of ratios; no table has rows of nothing, nor the page's heading or picture a claim."""
    page = (output / "compare.html").read_text(encoding="utf-8")

    for text in (shown, page):
        assert "Times and ratios of so few tokens say nothing" in " ".join(text.split())
        assert not re.search(r"[0-9] x (faster|slower|smaller|larger)", text)
    assert not re.search(r"^.* - +- *$", shown, re.MULTILINE)
    assert "--quick: figures say nothing" in page


def test_the_json_file_has_all_samples(shown, output):
    """It is in the one format: every candidate in every case, all rows with the tokens of the reference."""
    results = Results.load(output / "compare.json")

    assert results.cases() == [
        *({"batch_size": n} for n in (1, 2, 3)),
        *({"context": n} for n in (32, 64)),
        *({"concurrency": n} for n in (1, 3)),
    ]
    assert part(results, "context").candidates() == CACHES
    assert part(results, "concurrency").candidates() == SERVERS
    assert all(line.metrics["identical_percent"] == [100.0] and not line.note for line in results.lines)
    timed = [line for line in results.lines if line.case != {"batch_size": 1} and line.case != {"batch_size": 2}]
    assert all(line.metrics["mean_ttft_ms"][0] > 0 and line.metrics["mean_tpot_ms"][0] > 0 for line in timed)
    assert results.settings["max_new_tokens"] == 6
    assert results.environment["seed"] == 0


def test_the_page_needs_nothing_else(shown, output):
    """All plots are in the HTML page, as pictures that are inside it, each with two sentences, and no link leads away."""
    page = (output / "compare.html").read_text(encoding="utf-8")

    pictures = re.findall(r'<figure id="(\w+)"><img alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)">', page)
    assert [name for name, _ in pictures] == [panel.name for panel in PANELS]
    for _, picture in pictures:
        assert len(list(ElementTree.fromstring(base64.b64decode(picture)).iter())) > 50
    assert all(link.startswith("data:") for link in re.findall(r"(?:href|src)\s*=\s*[\"']?([^\"'> ]*)", page))
    assert not re.search(r"url\(|@import|<script|<link", page)
    assert all(len(re.findall(r"\.(?= |$)", panel.text)) == 2 for panel in PANELS)
    results = Results.load(output / "compare.json")
    assert page.count("<tr") == sum(1 + len(section(results, name).lines) for name in SECTIONS)


def test_memory_of_servers_is_measured_alike(shown, output):
    """Everybody has both numbers: what is allocated, and what requests held of it at their most."""
    found = section(Results.load(output / "compare.json"), "concurrency")
    sizes = {
        (line.case["concurrency"], line.candidate): (
            line.metrics["kv_allocated_bytes"][0],
            line.metrics["peak_kv_in_use_bytes"][0],
        )
        for line in found.lines
    }

    assert all(0 < in_use <= allocated for allocated, in_use in sizes.values())
    for name in ("one by one", "generate in threads", "one padded batch"):
        assert len(set(sizes[3, name])) == 1
    for name in ("ContinuousBatcher", *GENERATE_BATCH):
        allocated, in_use = sizes[3, name]
        assert in_use < allocated


def test_the_png_is_a_picture(shown, output):
    """The PNG can be opened, is as large as six plots, and is not one colour."""
    with Image.open(output / "compare.png") as picture:
        assert picture.width > 1000
        assert picture.height > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "qwen3_next"])
def test_other_models(kind, tmp_path):
    """A sliding window, learned positions, a hybrid; without a tokenizer prompts are random, as long as was asked for."""
    result = run(*SMALL, "--model", folder_of(kind, tmp_path), "--input-len", 20, "--output", tmp_path)

    assert result.exit_code == 0, result.output
    results = Results.load(tmp_path / "compare.json")
    assert max(results.details["prompt_lengths"]) == 20
    assert part(results, "context").candidates() == CACHES
    ours = [line for line in results.lines if line.candidate == "PagedCache"]
    assert [line.metrics["identical_percent"] for line in ours] == [[100.0]] * 3


def test_memory_is_counted_by_hand():
    """Rows of 3 and 5 tokens and 4 new ones, the last of which is never stored, on a model without windows."""
    of = subject("gpt2", (3, 5))
    config = of.model.config
    per_token = config.n_layer * 2 * config.n_embd * 4
    found = {kind.name: kind(of, of.prompts, 4).run().metrics for kind in (NoCache, Dynamic, Static, Paged)}

    names = ("reserved_bytes", "used_bytes", "wasted_bytes")
    tokens = {name: tuple(sample[key] / per_token for key in names) for name, sample in found.items()}
    assert tokens == {
        "no KV cache": (0, 0, 0),
        "DynamicCache": (2 * 8, 6 + 8, 2),
        "StaticCache": (2 * 9, 6 + 8, 4),
        "PagedCache": (2 * 16, 6 + 8, 18),
    }


def test_memory_of_a_sliding_window():
    """A layer with a window of w holds w - 1 tokens of a long row; blocks behind it go back, but they were held once."""
    of = subject("mistral", (40,))
    config = of.model.config
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    window = config.sliding_window
    assert window < 40
    dynamic, paged = (kind(of, of.prompts, 4).run().metrics for kind in (Dynamic, Paged))

    assert dynamic["reserved_bytes"] == dynamic["used_bytes"] == (window - 1) * per_token
    assert paged["used_bytes"] == (window - 1) * per_token
    assert paged["reserved_bytes"] % (16 * per_token) == 0
    assert paged["reserved_bytes"] >= 16 * per_token


@pytest.fixture
def wrong(monkeypatch):
    """A PagedCache whose second row has another last token."""
    generate = Dynamic._generate

    def generate_wrongly(self, cache, watch):
        tokens = generate(self, cache, watch)
        tokens[-1][-1] += 1
        return tokens

    monkeypatch.setattr(Paged, "_generate", generate_wrongly)


def test_wrong_tokens_are_noticed(wrong, tmp_path):
    """The command says which tokens differ and ends with 1; the others are measured all the same, and the files written."""
    result = run(*SMALL, "--output", tmp_path)

    assert result.exit_code == 1, result.output
    assert "NOT RIGHT: PagedCache: WRONG: row 0 differs from new token 3 on" in result.output
    results = Results.load(tmp_path / "compare.json")
    assert len(faults(results)) > 0
    assert results.line({"context": 16}, "PagedCache").metrics == {}
    assert results.line({"context": 16}, "StaticCache").metrics["mean_tpot_ms"][0] > 0
    assert "WRONG" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_in_16_bits_tokens_are_counted(wrong, tmp_path):
    """A padded batch may round differently in 16 bits: that is no fault, but the share of equal rows is shown."""
    result = run(*SMALL, "--dtype", "bfloat16", "--output", tmp_path)

    assert result.exit_code == 0, result.output
    results = Results.load(tmp_path / "compare.json")
    assert results.line({"context": 16}, "PagedCache").metrics["identical_percent"] == [0.0]
    assert "In bfloat16, 0 % or more of the rows" in result.output


def test_a_peer_that_fails_is_shown(monkeypatch, tmp_path):
    """What StaticCache cannot do ends nothing: its note is in the table and on the page."""

    def fail(self):
        raise NotImplementedError("no static layer for this model")

    monkeypatch.setattr(Static, "_cache", fail)
    result = run(*SMALL, "--output", tmp_path)

    assert result.exit_code == 0, result.output
    assert "StaticCache: NotImplementedError: no static layer for this model" in result.output
    assert "no static layer for this model" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert Results.load(tmp_path / "compare.json").line({"context": 16}, "PagedCache").metrics["mean_tpot_ms"]


def test_a_row_that_differs_is_found():
    """Fewer tokens than the reference are right, others are not, and no tokens at all are not either."""
    of = subject("gpt2", (3, 5))

    class Fake:
        name = "PagedCache"

        def __init__(self, answer):
            self.answer = answer

        def run(self):
            return Sample(self.answer, {"mean_ttft_ms": 1.0})

    right = [of.answer(row, 4) for row in of.prompts]
    answers = [right, [row[:2] for row in right], [right[0], right[0]], [[], right[1]]]
    notes = []
    for answer in answers:
        phase = Phase({"batch_size": 2}, [Fake(answer)], Alone(of, of.prompts, [4, 4]), 1, 0)
        (line,) = phase.run(lambda name: None)
        notes.append(line.note)

    assert right[0] != right[1]
    assert notes[:2] == ["", ""]
    assert notes[2].startswith("WRONG: row 1 differs")
    assert notes[3].startswith("WRONG: row 0 differs")


def test_contexts_end_with_the_model_and_the_budget():
    """A length that the model cannot read, or that would take too long, is left out with a reason."""
    of = subject("gpt2", (3, 5), batch_size=2, contexts=[8, 16, 4096], concurrency=(), time_budget=0.0)
    of.context = 512
    comparison = Comparison(of)
    skipped = []
    results = comparison.run("test", skip=skipped.append)

    assert comparison.left_out["context 4096"] == "the model reads 512 tokens at most"
    assert "--time-budget" in comparison.left_out["context 8"]
    assert skipped == [phase.num_runs for phase in comparison.contexts]
    assert not part(results, "context").lines
    assert results.details["left_out"].keys() >= {"context 8", "context 16", "context 4096"}


def test_a_page_without_matplotlib(shown, output, tmp_path, monkeypatch):
    """The page then has its tables and says what is missing."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    save_html(Results.load(output / "compare.json"), tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in page
    assert page.count("<table>") == 4
    assert "<figure" not in page


def test_models_that_have_no_keys(tmp_path):
    """Mamba keeps states only, which one line says."""
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    result = run("--quick", "--model", tmp_path / "mamba")

    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "keeps no keys and values" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", "many"), "--contexts is 'many'; give whole numbers"),
        (("--concurrency", "0"), "concurrency is [0]; all have to be at least 1"),
        (("--dtype", "float8"), "the dtype is 'float8'; give one of float32"),
        (("--max-new-tokens", 1), "max_new_tokens is 1; at least 2"),
        (("--input-len", 0), "input_len is 0; at least 1 is needed"),
        (("--input-len", -5), "input_len is -5; at least 1 is needed"),
        (("--input-len", 100000), "input_len is 100000: with 6 new tokens, prompts of this model have at most 4090"),
        (("--input-len", 20, "--prompt", "x = 1"), "input_len is 20, but prompts are given"),
        (("--time-budget", -5), "time_budget is -5.0; give seconds"),
        (("--time-budget", "nan"), "time_budget is nan; give seconds"),
        (("--batch-size", 999999), "batch_size is 999999; at most 1024"),
        (("--concurrency", "1,999999"), "concurrency is 999999; at most 1024"),
        (("--device", "nowhere"), "the device 'nowhere' cannot be used"),
        (("--max-new-tokens", 5000), "more than the model's context of 4096"),
        (("--prompt", " "), "the prompt ' ' is empty (--prompt, --prompts-file)"),
        (("--prompts-file", "missing.txt"), "cannot read --prompts-file missing.txt"),
    ],
)
def test_wrong_arguments(arguments, message):
    """They end in one line that names the value and what would be right."""
    result = run("--quick", *arguments)

    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1


def served(throughputs, is_quick=False):
    """Results of a concurrency of 8 with these samples."""
    lines = [
        Line({"concurrency": 8}, name, {"output_throughput": samples, "identical_percent": [100.0] * len(samples)})
        for name, samples in throughputs.items()
    ]
    return Results("compare", "", "", {}, {"is_quick": is_quick}, lines=lines, ours=[*OURS])


def test_findings_name_the_best_peer_and_doubt_close_ratios():
    """Ours is compared with the best of the others first; ratios on both sides of 1 are no difference."""
    samples = {
        "one by one": [600.0, 660.0, 630.0],
        "generate in threads": [200.0, 210.0, 190.0],
        "ContinuousBatcher": [630.0, 630.0, 630.0],
    }
    _, sentence = findings(served(samples))
    _, faster = findings(served(samples | {"ContinuousBatcher": [1300.0, 1310.0, 1320.0]}))

    assert sentence == (
        "concurrency 8, output tokens/s: ContinuousBatcher 630; no clear difference from one by one, the best of the others; "
        "3.1 x faster than generate in threads."
    )
    assert "2.1 x faster than one by one, the best of the others" in faster
    assert findings(served(samples, is_quick=True))[1:] == [QUICK]


def test_ratios_of_a_section_are_one_table():
    """A row per case, a column per peer, with the spread; peers without samples have none."""
    found = served({"one by one": [100.0, 200.0], "generate_batch": [], "ContinuousBatcher": [300.0, 400.0]})
    grid = ratio_grid(section(found, "concurrency"), "concurrency")

    assert grid.header == ["concurrency", "/ one by one"]
    assert grid.rows == [[("8", ""), ("2.50", "[2.00, 3.00]")]]


def test_the_picture_says_what_was_measured(output, shown):
    """Under its title: hardware, threads, dtype, prompts, versions and commit; legends explain themselves."""
    results = Results.load(output / "compare.json")
    text = origin(results)

    for expected in ("threads", "float32", "3 prompts of 8 to 24 tokens", "transformers ", "paged-cache ", "commit "):
        assert expected in text
    figure = Figure()
    axes = figure.subplots()
    draw(next(panel for panel in PANELS if panel.name == "throughput"), axes, results)
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert {"generate, one by one", "generate in threads", "one padded batch", "ContinuousBatcher"} <= set(labels)
    assert not GENERATE_BATCH or "transformers' generate_batch" in labels


def test_prompts_need_a_tokenizer(tmp_path):
    """A text for a model without a tokenizer is refused."""
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        load_subject(make_settings(quick=True, model=folder_of("gpt2", tmp_path), prompts=["x = 1"]))


def test_given_prompts(tmp_path):
    """Prompts from options and files are used in their order, again from the first one where more are needed."""
    (tmp_path / "lines.txt").write_text("import os\n\nx = 1\n", encoding="utf-8")
    (tmp_path / "list.json").write_text('["a\\nb"]', encoding="utf-8")
    prompts = [*read_prompts(tmp_path / "lines.txt"), *read_prompts(tmp_path / "list.json")]
    of = load_subject(Settings(prompts=tuple(prompts), concurrency=(5,), max_new_tokens=4))

    assert prompts == ["import os", "x = 1", "a\nb"]
    assert of.settings.rows == 3
    assert of.prompts[3:] == of.prompts[:2]
    assert len({tuple(row) for row in of.prompts}) == 3


def test_made_prompts_differ():
    """Without prompts there are as many as are needed, from short to long, all different."""
    of = load_subject(Settings(batch_size=4, concurrency=(16,)))

    assert len({tuple(row) for row in of.prompts}) == 16
    assert (min(map(len, of.prompts)), max(map(len, of.prompts))) == (8, 192)
    assert len(of.texts.long_prompt(300)) == 300


def test_long_prompts_are_as_long_as_asked():
    """A length beyond the usual one, and beyond a piece of text, is the length of the longest prompt."""
    of = load_subject(Settings(batch_size=3, concurrency=(), input_len=4000))

    assert max(map(len, of.prompts)) == 4000


def test_wrong_settings_are_found_before_anything_is_loaded(monkeypatch):
    """Sizes that make no sense are refused without a look at the model."""
    monkeypatch.setattr(report, "load_subject", lambda settings: pytest.fail("the model was loaded"))
    for option, value in {"--input-len": 0, "--batch-size": 999999, "--time-budget": "nan"}.items():
        assert run(option, value).exit_code == 1


def test_the_peak_of_threads_is_of_one_moment():
    """Requests that are over hold nothing: one behind the other, the peak is that of the largest."""
    live = Live()
    for number, sizes in enumerate([(3, 5, 0), (4, 6, 0)]):
        for size in sizes:
            live.update(number, size)
    assert live.peak == 6
    for number, size in enumerate((5, 6)):
        live.update(number, size)
    assert live.peak == 11


def test_threads_let_go_of_what_is_over(monkeypatch):
    """In a pool of one thread, requests come one after the other: the peak is the largest cache, not the sum."""
    of = subject("gpt2", (20, 30, 10))
    monkeypatch.setattr(concurrency, "ThreadPoolExecutor", lambda count: ThreadPoolExecutor(1))
    served = Threads(of).serve(Workload(of.prompts, [4, 4, 4]))
    per_token = of.model.config.n_layer * 2 * of.model.config.n_embd * 4

    assert served.requests[1].tokens == of.answer(of.prompts[1], 4)
    assert served.kv_in_use == served.kv_allocated == (30 + 3) * per_token


def test_numbers():
    """Numbers may be separated or repeated."""
    assert numbers("--contexts", ["1,2", "4 8"]) == [1, 2, 4, 8]
    assert numbers("--contexts", None) is None
    assert spread(8, 128, 5) == [8, 16, 32, 64, 128]


def test_prefixes_are_forgotten_between_rounds():
    """A second run of the same candidate computes the whole prompt again."""
    of = subject("gpt2", (40,))
    candidate = caches.Paged(of, of.prompts, 4)
    candidate.run()
    with models.TokenCounter(of.model) as counter:
        candidate.run()

    assert counter.tokens == 40 + 3
    assert torch.is_grad_enabled()
