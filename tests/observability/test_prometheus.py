"""Metrics: what Prometheus reads is what the batcher, the pool and the outputs say, under vLLM's names."""

import copy
import gc
import urllib.request

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from paged_cache import AsyncContinuousBatcher, BlockPool, ContinuousBatcher, InvalidRequestError, PagedCache, patch
from paged_cache.batching.output import FINISH_REASONS
from paged_cache.observability import PrometheusMetrics
from paged_cache.observability.histograms import Histogram, length_buckets
from tests.batching.alone import prompt, tiny
from tests.batching.faults import GREEDY, PROMPTS, batching, run, submit_all
from tests.models import poisoned_pool
from tests.observability.runs import Clock, run_to_every_end, run_with_preemptions

pytestmark = pytest.mark.timeout(30)

LATENCIES = (
    "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0 +Inf"
)
BUCKETS = {
    "time_to_first_token_seconds": (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0 +Inf"
    ),
    "inter_token_latency_seconds": (
        "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
    ),
    **dict.fromkeys(
        (
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
        ),
        LATENCIES,
    ),
    "iteration_tokens_total": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0 +Inf",
    "request_params_n": "1.0 2.0 5.0 10.0 20.0 +Inf",
}
"""What vLLM has."""

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached",
    "generation_tokens", "request_success",
}  # fmt: skip
LENGTHS = {"request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"}


def scraped(registry):
    """Families by name, through the text format."""
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


class Scrape:
    """Values of a registry at one moment."""

    def __init__(self, registry):
        self.samples = {}
        for family in scraped(registry).values():
            for sample in family.samples:
                extra = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine", "le")}
                self.samples.setdefault((sample.name, *extra.values()), []).append(sample)

    def __call__(self, *name):
        """The one value of a name and its further labels."""
        (sample,) = self.samples[(f"vllm:{name[0]}", *name[1:])]
        return sample.value


def test_names_types_labels_and_buckets():
    """Dashboards for vLLM find what they ask for."""
    registry = CollectorRegistry()
    with batching() as batcher:
        PrometheusMetrics(batcher, registry=registry, model_name="m", engine="7")
        run(batcher, submit_all(batcher))
        families = scraped(registry)
    for name in GAUGES | COUNTERS | LENGTHS | set(BUCKETS):
        family = families["vllm:" + name]
        kind = "gauge" if name in GAUGES else "counter" if name in COUNTERS else "histogram"
        assert family.type == kind, name
        for sample in family.samples:
            assert sample.labels["engine"] == "7"
            assert sample.labels["model_name"] == "m"
        if name in BUCKETS:
            bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
            assert bounds == BUCKETS[name].split(), name
        if name in COUNTERS:
            assert all(sample.name == f"vllm:{name}_total" for sample in family.samples)
    assert {s.labels["finished_reason"] for s in families["vllm:request_success"].samples} == set(FINISH_REASONS)
    (config,) = families["vllm:cache_config_info"].samples
    assert (config.value, config.labels["num_gpu_blocks"], config.labels["block_size"]) == (1, "300", "4")
    assert (config.labels["cache_dtype"], config.labels["enable_prefix_caching"]) == ("float32", "True")


def test_counts_are_those_of_the_batcher():
    """Gauges in the middle and counters in the end: what `stats` and the outputs say, preemptions and cached tokens included."""
    registry = CollectorRegistry()
    with batching(num_blocks=14, max_num_seqs=4) as batcher:
        PrometheusMetrics(batcher, registry=registry)
        handles = submit_all(batcher, PROMPTS[:3])
        batcher.step()
        value, stats = Scrape(registry), batcher.stats()
        assert stats.num_running > 0
        assert (value("num_requests_running"), value("num_requests_waiting")) == (stats.num_running, stats.num_waiting)
        assert value("kv_cache_usage_perc") == pytest.approx(stats.blocks_in_use / 14)
        outputs = (
            run(batcher, handles) + run_with_preemptions(batcher) + run(batcher, submit_all(batcher, PROMPTS[2:3]))
        )
        value, stats = Scrape(registry), batcher.stats()
    assert value("num_preemptions_total") == stats.num_preemptions > 0
    assert value("generation_tokens_total") == stats.num_generated_tokens
    assert value("generation_tokens_total") == sum(len(output.generated_tokens) for output in outputs)
    assert value("prompt_tokens_total") == sum(len(output.prompt_ids) for output in outputs)
    assert value("prompt_tokens_cached_total") == sum(output.cached_tokens for output in outputs)
    assert value("prefix_cache_queries_total") == stats.prefix_queries == value("prompt_tokens_total")
    assert value("prefix_cache_hits_total") == stats.prefix_hits
    assert value("request_success_total", "length") == stats.finished["length"] == len(outputs)
    assert value("iteration_tokens_total_count") == stats.num_steps
    assert value("iteration_tokens_total_sum") == stats.num_batched_tokens


def test_histograms_are_those_of_the_outputs():
    """Sums and counts are those of the requests' own metrics; who did not come to a time is not counted in it."""
    clock, registry = Clock(tick=0.07), CollectorRegistry()
    with batching(clock=clock) as batcher:
        PrometheusMetrics(batcher, registry=registry)
        outputs = run_to_every_end(batcher, clock)
        value, stats = Scrape(registry), batcher.stats()
    began = [output for output in outputs if output.finish_reason != "rejected"]
    answered = [output.metrics for output in began if output.metrics.ttft is not None]
    assert len(answered) == 3  # "length", "stop" and "abort"
    for reason in FINISH_REASONS:
        assert value("request_success_total", reason) == stats.finished[reason] == 1
    expected = {
        "time_to_first_token_seconds": [times.ttft for times in answered],
        "e2e_request_latency_seconds": [output.metrics.e2e_latency for output in began],
        "request_queue_time_seconds": [o.metrics.queue_time for o in began if o.metrics.queue_time is not None],
        "request_prefill_time_seconds": [times.ttft - times.queue_time for times in answered],
        "request_prompt_tokens": [len(output.prompt_ids) for output in began],
        "request_generation_tokens": [len(output.generated_tokens) for output in began],
        "request_params_n": [1] * 5,
        "request_params_max_tokens": [GREEDY["max_new_tokens"]] * 5,
    }
    for name, values in expected.items():
        assert value(name + "_count") == len(values), name
        assert value(name + "_sum") == pytest.approx(sum(values)), name
    gaps = sum(len(output.generated_tokens) - 1 for output in outputs if output.generated_tokens)
    assert value("inter_token_latency_seconds_count") == gaps > 0
    decode = value("request_decode_time_seconds_sum")
    assert value("inter_token_latency_seconds_sum") == pytest.approx(decode)
    assert value("request_inference_time_seconds_sum") == pytest.approx(
        decode + value("request_prefill_time_seconds_sum")
    )


def test_buckets_count_what_is_not_above():
    """A value on a bound is below it; what is above all bounds is only in the last bucket."""
    histogram = Histogram("", (1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 8
    assert length_buckets(120) == (1, 2, 5, 10, 20, 50, 100)


def test_pool_alone():
    """Plain `generate` calls: how full the pool is, prefixes, blocks by state; nothing of requests."""
    of, registry = tiny("llama"), CollectorRegistry()
    pool = poisoned_pool(of, 50)
    metrics = PrometheusMetrics(pool=pool, registry=registry, model_name="m")
    ids = __import__("torch").tensor([prompt(21)])
    with patch(of):
        of.generate(ids, past_key_values=PagedCache(pool), **GREEDY)
        cache = PagedCache(pool)
        of.generate(ids, past_key_values=cache, **GREEDY)
        value, stats = Scrape(registry), pool.stats()
        assert value("kv_cache_usage_perc") == stats.num_referenced / 50 > 0
        assert value("prefix_cache_hits_total") == stats.prefix_hits > 0
        assert ("vllm:num_requests_running",) not in value.samples
        states = {s: value.samples["paged_cache:blocks", s][0].value for s in ("free", "cached", "in_use")}
        assert sum(states.values()) == 50
        assert states["in_use"] == stats.num_referenced
    metrics.close()
    assert not scraped(registry)


def test_several_batchers_in_one_registry():
    """Labels tell them apart, the same labels twice are refused, and what is garbage or closed goes."""
    registry = CollectorRegistry()
    of = tiny("llama")
    pool = poisoned_pool(of)
    first, second = (ContinuousBatcher(of, pool) for _ in range(2))
    PrometheusMetrics(first, registry=registry, engine="0")
    other = PrometheusMetrics(second, registry=registry, engine="1")
    with pytest.raises(InvalidRequestError, match="engine='1'"):
        PrometheusMetrics(second, registry=registry, engine="1")
    run(first, submit_all(first))
    family = scraped(registry)["vllm:generation_tokens"]
    assert {sample.labels["engine"]: sample.value for sample in family.samples} == {"0": 30, "1": 0}
    other.close()
    first.close()
    del first
    gc.collect()
    assert not scraped(registry)
    PrometheusMetrics(second, registry=registry, engine="1", prefix="mine:").close()
    second.close()


def test_closed_batchers_are_over():
    """`close` takes the series out, though the batcher is held, and its labels are free for the next one."""
    registry, of = CollectorRegistry(), tiny("llama")
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool) as first:
        PrometheusMetrics(first, registry=registry)
        assert scraped(registry)
    assert not scraped(registry)
    with ContinuousBatcher(of, pool) as second:
        PrometheusMetrics(second, registry=registry)
        assert scraped(registry)
    assert not scraped(registry)


def test_no_series_comes_twice():
    """Batchers of different models and one engine, and pools, share a registry; another prefix tells nobody apart."""
    registry, of = CollectorRegistry(), tiny("llama")
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool, max_loras=2) as first, ContinuousBatcher(of, pool, max_loras=2) as second:
        PrometheusMetrics(first, registry=registry, model_name="a")
        PrometheusMetrics(second, registry=registry, model_name="b", prefix="mine:")
        PrometheusMetrics(pool=pool, registry=registry, model_name="c")
        PrometheusMetrics(second, registry=registry, model_name="d")
        with pytest.raises(InvalidRequestError, match="model_name='a'"):
            PrometheusMetrics(first, registry=registry, model_name="a", prefix="mine:")
        text = generate_latest(registry).decode()
    series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert sum(name.startswith("vllm:lora_requests_info") for name in series) == 2
    assert len(series) == len(set(series))


def test_beams_are_not_returned_sequences():
    """An aborted beam search counts the sequences that were asked for, and the tokens of those, as one that ends does."""
    registry = CollectorRegistry()
    with batching(num_blocks=600) as batcher:
        PrometheusMetrics(batcher, registry=registry)
        handle = batcher.submit(prompt(9), **GREEDY, num_beams=4, num_return_sequences=2)
        batcher.step()
        batcher.step()
        assert batcher.stats().num_generated_tokens == 8
        handle.cancel()
        value = Scrape(registry)
        assert (value("request_params_n_sum"), value("request_generation_tokens_sum")) == (2, 4)
        early = batcher.submit(prompt(9), **GREEDY, num_beams=4)
        early.cancel()
        run(batcher, [batcher.submit(prompt(9), max_new_tokens=6, num_return_sequences=3, do_sample=True, seed=1)])
        value = Scrape(registry)
        assert (value("request_params_n_sum"), value("request_params_n_count")) == (2 + 1 + 3, 3)


@pytest.mark.parametrize("arguments", [{}, {"batcher": 3}, {"pool": "pool"}])
def test_what_cannot_be_shown(arguments):
    """Neither, both, or something else: refused by name, and nothing is registered."""
    registry = CollectorRegistry()
    with pytest.raises(InvalidRequestError, match="needed"):
        PrometheusMetrics(**arguments, registry=registry)
    with batching() as batcher, pytest.raises(InvalidRequestError, match="one of them"):
        PrometheusMetrics(batcher, pool=batcher.pool, registry=registry)
    assert not scraped(registry)


def test_over_http_from_asyncio():
    """`AsyncContinuousBatcher`, the default registry, the model's own name, and a scrape as Prometheus does it."""
    import asyncio

    of = tiny("llama")

    async def main():
        async with AsyncContinuousBatcher(of, poisoned_pool(of)) as batcher:
            metrics = PrometheusMetrics(batcher)
            await batcher.generate(PROMPTS, **GREEDY)
            server, thread = start_http_server(0, addr="127.0.0.1", registry=REGISTRY)
            try:
                url = f"http://127.0.0.1:{server.server_port}/metrics"
                return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
            finally:
                server.shutdown()
                server.server_close()
                thread.join(10)
                metrics.close()

    text = asyncio.run(main())
    assert 'vllm:generation_tokens_total{engine="0",model_name="LlamaForCausalLM"} 30.0' in text
    assert "vllm:" not in generate_latest(REGISTRY).decode()


def test_adapters():
    """Which adapters running and waiting requests name, as vLLM shows it; none where none are used."""
    from paged_cache.batching.events import Finished, Preempted, Queued, Scheduled
    from paged_cache.batching.output import RequestMetrics

    registry = CollectorRegistry()
    about = {"model_name": "m", "engine": "0", "max_lora": "2"}
    with batching(max_loras=2) as batcher:
        metrics = PrometheusMetrics(batcher, registry=registry, model_name="m")
        for name, adapter in (("1", "a"), ("2", "b"), ("3", "b"), ("4", None)):
            metrics(Queued(1.0, name, 5, 5, 1, 0, adapter))
        metrics(Scheduled(2.0, "1", 5, 0, True))
        metrics(Scheduled(2.0, "2", 5, 0, True))
        metrics(Scheduled(2.0, "4", 5, 0, True))
        (sample,) = scraped(registry)["vllm:lora_requests_info"].samples
        assert sample.labels == {**about, "running_lora_adapters": "a,b", "waiting_lora_adapters": "b"}
        metrics(Preempted(3.0, "1", 1))
        metrics(Finished(3.0, "2", "stop", None, 5, 0, 5, 1, 5, RequestMetrics(1.0), 0.0))
        (sample,) = scraped(registry)["vllm:lora_requests_info"].samples
        assert sample.labels == {**about, "running_lora_adapters": "", "waiting_lora_adapters": "a,b"}
    with batching() as batcher:
        registry = CollectorRegistry()
        PrometheusMetrics(batcher, registry=registry)
        assert "vllm:lora_requests_info" not in scraped(registry)


def test_base_is_no_adapter():
    """Requests of a real peft model: those for "__base__" or the active adapters are no adapter's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    of = peft.get_peft_model(copy.deepcopy(tiny("llama")), config, adapter_name="x").eval()
    registry = CollectorRegistry()
    with ContinuousBatcher(of, BlockPool.for_model(of, num_blocks=100), max_num_seqs=2) as batcher:
        PrometheusMetrics(batcher, registry=registry)
        names = ["x", "__base__", "__base__"]
        handles = [batcher.submit(PROMPTS[0], **GREEDY, adapter_name=name) for name in names]
        batcher.step()
        assert (batcher.stats().num_running, batcher.stats().num_waiting) == (2, 1)
        (sample,) = scraped(registry)["vllm:lora_requests_info"].samples
        assert (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"]) == ("x", "")
        run(batcher, handles)
