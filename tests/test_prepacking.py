"""Linear layers over packed copies: the same results, changed weights are noticed, and no trace is left."""

import copy
import io
import logging
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from paged_cache import (
    BlockPool,
    InvalidRequestError,
    PagedCache,
    Prepacked,
    patch,
    prepack_weights,
    prepacking,
)
from tests.architectures.tiny import build
from tests.packed_calls import count_packed_calls

pytestmark = pytest.mark.skipif(not prepacking.packed_dtypes(), reason="torch has no oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """Numbers of rows that the packed path was called with; it takes calls of any size."""
    monkeypatch.setattr(prepacking, "MIN_PRODUCTS", 1)
    return count_packed_calls(monkeypatch)


@pytest.fixture
def layer():
    """A layer with frozen weights, whose bias is not small."""
    torch.manual_seed(0)
    return torch.nn.Linear(96, 160).requires_grad_(False)


@pytest.fixture
def model():
    """A tiny model of its own, since weights are changed."""
    return build("llama")[0]


def trace(module):
    """What would show that something was installed."""
    return [(type(part), dict(vars(part)), dict(part._forward_hooks)) for part in module.modules()]


def close(found, layer, x):
    """Whether an output is that of the weights as they are, within what the order of sums changes."""
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return found.dtype is expected.dtype and (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (64,), (3, 5), ()])
def test_outputs_are_those_of_the_layer(calls, shape, bias):
    """With any number of rows, in any number of dimensions."""
    layer, x = torch.nn.Linear(96, 160, bias=bias).requires_grad_(False), torch.randn(*shape, 96)
    with prepack_weights(layer) as prepacked:
        found = layer(x)
        assert found.shape == (*shape, 160)
        assert close(found, layer, x)

    assert prepacked.num_layers == 1
    assert calls == [max(1, shape[0] if len(shape) == 1 else 15 if shape else 1)]


def test_inputs_in_strides(calls, layer):
    """Rows that do not lie side by side are read where they are."""
    x = torch.randn(7, 200)[:, 3:99]
    with prepack_weights(layer):
        assert close(layer(x), layer, x)

    assert calls == [7]


def test_small_calls_are_left_alone(calls, layer, monkeypatch):
    """The packed path begins where it pays: by multiplications, as many rows as that takes."""
    monkeypatch.setattr(prepacking, "MIN_PRODUCTS", 3 * 96 * 160)
    with prepack_weights(layer):
        for rows in (1, 2, 3, 4):
            layer(torch.randn(rows, 96))

    assert calls == [3, 4]


@pytest.mark.skipif(torch.bfloat16 not in prepacking.packed_dtypes(), reason="no bfloat16 in oneDNN here")
def test_bfloat16(calls, layer):
    """The same weights, rounded once."""
    layer, x = layer.bfloat16(), torch.randn(9, 96).bfloat16()
    expected = layer(x).float()
    with prepack_weights(layer):
        found = layer(x)

    assert calls == [9]
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def _optimizer(layer):
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight], 1.0)
    layer(torch.randn(4, 96)).square().sum().backward()
    optimizer.step()
    layer.requires_grad_(False)


CHANGES = {
    "optimizer": _optimizer,
    "load_state_dict": lambda layer: layer.load_state_dict(torch.nn.Linear(96, 160).state_dict()),
    "another parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.randn(160, 96), False)),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(160, 96)),
    "written through data": lambda layer: layer.weight.data.mul_(-1),
    "bias": lambda layer: layer.bias.data.fill_(9),
    "another bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(calls, layer, change):
    """Whatever way they changed, the next call has the new ones, and by the packed path."""
    x = torch.randn(7, 96)
    with prepack_weights(layer):
        before = layer(x)
        CHANGES[change](layer)
        calls.clear()
        found = layer(x)

        assert close(found, layer, x)
        assert not torch.allclose(found, before)
        assert calls == [7]


def test_invalidate_reaches_what_no_counter_shows(calls, model):
    """A single element written through `.data` is seen behind `pool.invalidate()`."""
    pool = BlockPool.for_model(model, num_blocks=8)
    layer, x = model.lm_head, torch.randn(2, model.config.hidden_size)
    with torch.no_grad(), prepack_weights(model):
        layer(x)
        layer.weight.data[1, 1] += 100.0
        assert not close(layer(x), layer, x)  # else this test shows nothing
        pool.invalidate()
        assert close(layer(x), layer, x)
        assert len(calls) == 3


@pytest.mark.parametrize("change", [lambda layer: layer.double(), lambda layer: layer.to("meta")])
def test_weights_that_became_others_run_as_before(calls, layer, change):
    """A dtype or device without packed weights: the layer computes by itself."""
    with prepack_weights(layer) as prepacked:
        change(layer)
        x = torch.randn(3, 96).to(layer.weight)
        assert layer(x).shape == (3, 160)
        assert prepacked.nbytes in (0, 160 * 96 * 4)

    assert not calls
    assert type(layer) is torch.nn.Linear


def test_removed_without_a_trace(model):
    """Types, attributes and hooks of all modules are as before; removing twice is the same as once."""
    before = trace(model)
    prepacked = prepack_weights(model)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert prepacked.num_layers == len(layers) > 5
    assert prepacked.nbytes == sum(layer.weight.nbytes for layer in layers)
    assert repr(model) == repr(build("llama")[0])
    prepacked.remove()
    prepacked.remove()

    assert trace(model) == before
    assert not any(layer in prepacking._packings for layer in layers)
    assert prepacked.nbytes == 0


def test_two_holders_share_the_copies(calls, layer):
    """The copy is the same one, and stays until the second holder lets go."""
    first, second = prepack_weights(layer), prepack_weights(layer)
    packed = prepacking._packings[layer].copy.packed
    first.remove()
    layer(torch.randn(2, 96))
    assert prepacking._packings[layer].copy.packed is packed
    assert calls == [2]
    second.remove()

    assert type(layer) is torch.nn.Linear
    assert layer not in prepacking._packings


def test_gradients_are_computed_as_before(calls, model):
    """In training mode, with gradients: by autograd, equal to those of a model that is not prepacked."""
    other = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with prepack_weights(model):
        model.train()(ids, labels=ids).loss.backward()
        assert not calls
        with torch.no_grad():
            assert model.training
            model(ids)
        assert calls
    other.train()(ids, labels=ids).loss.backward()

    for (name, mine), (_, its) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, msg=name)


def test_gradients_of_inputs(calls, layer):
    """Frozen weights let gradients through to an input that wants some."""
    x = torch.randn(3, 96, requires_grad=True)
    with prepack_weights(layer):
        layer(x).sum().backward()

    assert not calls
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 96))


def _copied(model, folder):
    return copy.deepcopy(model)


def _pickled(model, folder):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _saved(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("make", [_copied, _pickled, _saved], ids=["deepcopy", "torch.save", "save_pretrained"])
def test_copies_carry_nothing(calls, model, tmp_path, make):
    """They are plain models with the same weights, and the model itself stays prepacked."""
    names = [set(vars(module)) for module in copy.deepcopy(model).modules()]
    with torch.no_grad(), prepack_weights(model):
        found = make(model, tmp_path)
        assert not any(type(module) is prepacking.PrepackedLinear for module in found.modules())
        inside = [set(vars(module)) for module in found.modules()]
        assert inside[1:] == names[1:]  # the model itself gets some by loading
        ids = torch.tensor([[5, 6, 7]])
        expected = found(ids).logits
        assert not calls
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert calls


def test_compiled_code_has_layers_of_its_own(calls, layer):
    """What `torch.compile` made traces through a prepacked layer, and a compiled model is left alone."""
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), torch.randn(4, 96)
    with prepack_weights(layer):
        assert close(compiled(x), layer, x)
        assert not calls
        assert prepack_weights(compiled).num_layers == 0


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("way", ["autocast", "vmap", "oneDNN off"])
def test_calls_that_are_not_for_onednn_run_as_before(calls, layer, way):
    """Autocast, functorch and `torch.backends.mkldnn` have their effect."""
    x = torch.randn(4, 96)
    with prepack_weights(layer):
        if way == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype is torch.bfloat16
        elif way == "vmap":
            assert close(torch.func.vmap(layer)(x), layer, x)
        else:
            with torch.backends.mkldnn.flags(enabled=False):
                assert close(layer(x), layer, x)
        assert not calls
        layer(x)
        assert calls == [4]


class _Other(torch.nn.Linear):
    """A layer of somebody else's, such as a quantised one."""


def test_only_plain_layers_are_prepacked():
    """Subclasses, other dtypes, parametrized weights, hooked forwards and weights that are elsewhere stay as they are."""
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
    hooked = torch.nn.Linear(8, 8)
    hooked.forward = torch.nn.Linear(8, 8).forward
    with torch.inference_mode():
        uncounted = torch.nn.Linear(8, 8)
    others = [_Other(8, 8), torch.nn.Linear(8, 8).double(), torch.nn.Linear(8, 8, device="meta"), parametrized]
    model = torch.nn.Sequential(*others, hooked, uncounted, torch.nn.Linear(8, 8))
    kinds = [type(layer) for layer in model]
    with prepack_weights(model) as prepacked:
        assert prepacked.num_layers == 1
        assert [type(layer) for layer in model] == [*kinds[:-1], prepacking.PrepackedLinear]


def test_what_changes_a_prepacked_layer_later(calls, layer):
    """A parametrization, or a forward put around it, makes it compute by itself; removing stays possible."""
    x = torch.randn(4, 96)
    prepacked = prepack_weights(layer)
    own = layer.forward
    layer.forward = lambda x: own(x)
    layer(x)
    del layer.forward
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Tanh())
    assert close(layer(x), layer, x)
    assert not calls
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    prepacked.remove()

    assert type(layer) is torch.nn.Linear


def test_offloaded_layers_stay_as_they_are(calls, model):
    """accelerate brings their weights for one forward at a time: only what is in memory is prepacked."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model.model.layers[0], execution_device=torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7]])
    offloaded = set(model.model.layers[0].modules())
    with torch.no_grad():
        expected = model(ids).logits
        with prepack_weights(model) as prepacked:
            assert prepacked.num_layers > 0
            assert not any(type(layer) is prepacking.PrepackedLinear for layer in offloaded)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls


@pytest.mark.parametrize("missing", ["operators", "device"])
def test_where_nothing_can_be_prepacked(calls, layer, caplog, monkeypatch, missing):
    """A line says why, and everything is as before."""
    if missing == "operators":
        monkeypatch.setattr(prepacking, "packed_dtypes", tuple)
    else:
        layer.to("meta")
    with caplog.at_level(logging.INFO, "paged_cache"), prepack_weights(layer) as prepacked:
        assert (prepacked.num_layers, prepacked.nbytes) == (0, 0)
        assert type(layer) is torch.nn.Linear

    (record,) = caplog.records
    reason = "torch has no oneDNN here" if missing == "operators" else "none is a plain torch.nn.Linear on the CPU"
    assert record.getMessage().startswith(f"linear layers of Linear stay as they are: {reason}")


def test_a_failure_changes_nothing(model, monkeypatch):
    """Memory that runs out at the third layer leaves no layer prepacked."""
    before, real, count = trace(model), prepacking.packed_weight, [0]

    def failing(weight):
        count[0] += 1
        if count[0] == 3:
            raise MemoryError
        return real(weight)

    monkeypatch.setattr(prepacking, "packed_weight", failing)
    with pytest.raises(MemoryError):
        prepack_weights(model)

    assert trace(model) == before


def test_many_threads(calls, layer):
    """Forwards, changed weights and holders that come and go at the same time: every output is one of the two weights'."""
    x, weights = torch.randn(4, 96), [torch.randn(160, 96) for _ in range(2)]
    allowed = [torch.nn.functional.linear(x, weight, layer.bias) for weight in weights]
    parameters = [torch.nn.Parameter(weight, False) for weight in weights]
    wrong, over = [], threading.Event()
    layer.weight = parameters[0]

    def work():
        while not over.is_set():
            found = layer(x)
            if not any(torch.allclose(found, expected, rtol=1e-3, atol=1e-3) for expected in allowed):
                wrong.append(found)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    with prepack_weights(layer):
        for thread in threads:
            thread.start()
        for i in range(200):
            with prepack_weights(layer):
                layer.weight = parameters[i % 2]
        over.set()
        for thread in threads:
            thread.join(timeout=20)

    assert not any(thread.is_alive() for thread in threads)
    assert calls
    assert not wrong


def adapted(model):
    """An adapter that matters, around some of the layers."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def test_adapters_of_peft(calls, model):
    """Base layers are prepacked, adapters are not; merging them, which goes through `.data`, and unmerging is noticed."""
    ids = torch.tensor([[5, 6, 7]])
    adapters = adapted(model)
    with torch.no_grad(), prepack_weights(adapters) as prepacked:
        inside = {name for name, module in adapters.named_modules() if type(module) is prepacking.PrepackedLinear}
        assert prepacked.num_layers == len(inside)
        assert any(name.endswith("q_proj.base_layer") for name in inside)
        assert not any("lora_" in name for name in inside)
        expected = copy.deepcopy(adapters)(ids).logits
        assert not calls
        for change in (lambda: None, adapters.merge_adapter, adapters.unmerge_adapter):
            change()
            torch.testing.assert_close(adapters(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert calls
        with adapters.disable_adapter():
            assert not torch.allclose(adapters(ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_generate_with_a_cache(calls, model):
    """Without a batcher: tokens are those of `DynamicCache` on plain layers."""
    ids = torch.arange(10, 43)[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    pool = BlockPool.for_model(model, num_blocks=20)
    with patch(model), prepack_weights(model):
        found = model.generate(ids, past_key_values=PagedCache(pool), max_new_tokens=12, do_sample=False)

    assert torch.equal(found, expected)
    assert len(calls) > 12 * 5


def test_no_module():
    """What is no module is named."""
    with pytest.raises(InvalidRequestError, match=r"model='llama': a torch.nn.Module is needed"):
        prepack_weights("llama")


def test_nothing_prepacked_is_a_handle_too():
    """It can be left and removed."""
    with Prepacked() as nothing:
        nothing.remove()

    assert nothing.num_layers == 0
