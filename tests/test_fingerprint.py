"""What names a model: its content, and nothing else."""

import copy

import accelerate
import peft
import pytest
import torch

from paged_cache import BlockPool, InvalidRequestError
from paged_cache.fingerprint import adapters_digest, model_config, tensor_digest, weights_digest
from tests.models import model

NUM_BYTES = [0, 1, 3, 4, 7, 2**16 - 1, 2**16, 2**16 + 1, 40 * 2**16 + 5]


@pytest.mark.parametrize("num_bytes", NUM_BYTES)
def test_any_bit_counts(num_bytes):
    """Tensors of any size: one bit more or less anywhere is another tensor, the same bits elsewhere are the same one."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    digest = tensor_digest(data)
    assert tensor_digest(data.clone()) == digest
    shifted = torch.cat([data.new_zeros(3), data])[3:]
    assert tensor_digest(shifted) == digest
    for place in {0, num_bytes // 2, num_bytes - 1} if num_bytes else ():
        for bit in (1, 128):
            other = data.clone()
            other[place] ^= bit
            assert tensor_digest(other) != digest
    assert tensor_digest(torch.cat([data, data.new_zeros(1)])) != digest


def test_known_value():
    """The name of a tensor is the same in every process and version: files depend on it."""
    assert tensor_digest(torch.arange(100000, dtype=torch.float32)) == "93f53ff6f0f38ec27cab293e96d24d24"


def test_order_sign_shape_and_dtype_count():
    """Swapped elements, two signs, another shape or dtype of the same bits make another name; strides do not."""
    x = torch.randn(64, 48)
    two_signs = x.clone()
    two_signs[3, 4:6] *= -1
    swapped = x.clone()
    swapped[0], swapped[1] = x[1], x[0]
    others = [two_signs, swapped, -x, x.T, x.view(48, 64), x.view(torch.int32), x.double(), x.to(torch.bfloat16)]
    assert len({tensor_digest(y) for y in [x, *others]}) == 1 + len(others)
    assert tensor_digest(x.T.contiguous().T) == tensor_digest(x)
    assert tensor_digest(x.to(torch.float8_e4m3fn)) != tensor_digest(x.to(torch.int8))


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", NUM_BYTES)
def test_devices_agree(num_bytes):
    """The same bits have the same name on a GPU."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    assert tensor_digest(data.cuda()) == tensor_digest(data)


def test_a_model_and_its_copies(tmp_path):
    """Copied, saved and loaded, tied or with two equal weights, frozen or not: the same name."""
    of = copy.deepcopy(model("llama"))
    digest, config = weights_digest(of), model_config(of)
    assert digest == weights_digest(model("llama"))
    of.requires_grad_(False)
    of.save_pretrained(tmp_path)
    loaded = type(of).from_pretrained(tmp_path).eval()
    assert (weights_digest(loaded), model_config(loaded)) == (digest, config)
    of.lm_head.weight = of.model.embed_tokens.weight
    tied = weights_digest(of)
    assert tied != digest
    of.lm_head.weight = torch.nn.Parameter(of.model.embed_tokens.weight.clone())
    assert weights_digest(of) == tied
    assert weights_digest(of.double()) != tied


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}]
)
def test_peft_around_a_model(options, tmp_path):
    """With adapters around its layers a model has the same name as without, loaded or active ones included."""
    digest, config = weights_digest(model("llama")), model_config(model("llama"))
    lora = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False, **options}
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model("llama")), lora, adapter_name="one").eval()
    wrapped.add_adapter("two", lora)
    inner = wrapped.get_base_model()
    assert (weights_digest(inner), model_config(inner)) == (digest, config)
    assert adapters_digest(inner, "__base__") == ([], "none")
    one, two = adapters_digest(inner, "one"), adapters_digest(inner, "two")
    assert adapters_digest(inner, None) == one
    assert one[0] == ["one"]
    assert one[1] != two[1]

    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model("llama")), tmp_path / "one", adapter_name="one").eval()
    assert adapters_digest(again.get_base_model(), "one") == one
    wrapped.set_adapter("two")
    wrapped.delete_adapter("one")
    assert adapters_digest(inner, None) == two
    assert weights_digest(wrapped.unload()) == digest


def test_adapters_have_the_name_of_their_content():
    """What an adapter is called does not count; which ones are active together does, in their order."""
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)

    def digests(*names):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(copy.deepcopy(model("llama")), lora, adapter_name=names[0]).eval()
        wrapped.add_adapter(names[1], lora)
        found = [adapters_digest(wrapped.get_base_model(), name)[1] for name in names]
        for active in (names, names[::-1]):
            wrapped.base_model.set_adapter(list(active))
            used, digest = adapters_digest(wrapped.get_base_model(), None)
            assert used == list(active)
            found.append(digest)
        return found

    found = digests("sql", "chat")
    assert found == digests("law", "sql")
    assert len(set(found)) == 4


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_weights(where, tmp_path):
    """Weights that accelerate takes away between forwards are read where they are."""
    of = copy.deepcopy(model("llama"))
    digest = weights_digest(of)
    if where == "memory":
        accelerate.cpu_offload(of, torch.device("cpu"))
    else:
        accelerate.disk_offload(of, tmp_path, torch.device("cpu"))
    assert of.model.layers[0].mlp.up_proj.weight.is_meta
    assert weights_digest(of) == digest


def test_weights_that_are_nowhere():
    """A model on the meta device has no content: this is said, with the name of a weight."""
    of = copy.deepcopy(model("llama")).to("meta")
    with pytest.raises(InvalidRequestError, match=r"model\.embed_tokens\.weight is on the meta device"):
        weights_digest(of)


def test_a_model_that_accelerate_offloads_takes_a_file(tmp_path):
    """A file of a model in memory fits the same model offloaded."""
    of = copy.deepcopy(model("llama"))
    pool = BlockPool.for_model(of, num_blocks=20, block_size=4)
    pool.save_prefixes(tmp_path / "file")
    offloaded = accelerate.cpu_offload(copy.deepcopy(of), torch.device("cpu"))
    assert BlockPool.for_model(offloaded, num_blocks=20, block_size=4).load_prefixes(tmp_path / "file") == 0
