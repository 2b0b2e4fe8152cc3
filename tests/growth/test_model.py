"""Growing models of transformers in memory: the class, the config and the function of what comes out."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import raygrow
from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.model import grow_model
from raygrow.growth.width import Width
from raygrow.weights.verify import output_difference
from tests.growth.racks import TOKENS, random_rack, tiny

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random_model(family: str = "llama", **settings) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, **settings))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=6, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()  # in fp32: transformers' norms compute in it whatever the model's dtype


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_exact_operators_keep_the_function_of_a_transformers_model(family, tied):
    source = random_model(family, tie_word_embeddings=tied)
    before = copy.deepcopy(source.state_dict())
    expected = source(TOKENS).logits
    for operator in (
        Width(factor=2, untie=tied),
        Width(factor=4, d_model=1, d_ff=3, untie=tied),
        Depth(extra_layers=1, identity=True),
    ):
        grown = grow_model(source, operator)
        assert type(grown) is type(source)
        assert output_difference(expected, grown(TOKENS).logits) <= 1e-5, operator
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_config_of_the_grown_model_is_that_of_a_model_built_so(family, tmp_path):
    source = random_model(family, bos_token_id=3, eos_token_id=4)
    source.generation_config.repetition_penalty = 1.5
    grown = grow_model(grow_model(source, Width(factor=2)), Depth(extra_layers=3))
    wider = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    for key, value in wider.items():
        assert getattr(grown.config, key) == value
    assert grown.config.head_dim == source.config.head_dim
    assert (grown.config.bos_token_id, grown.config.eos_token_id) == (3, 4)
    assert grown.generation_config.repetition_penalty == 1.5
    # what is saved opens as what it is
    grown.save_pretrained(tmp_path)
    opened = type(source).from_pretrained(tmp_path)
    assert torch.equal(opened(TOKENS).logits, grown(TOKENS).logits)
    assert grown.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)


def test_an_untied_model_has_a_head_of_its_own():
    grown = grow_model(random_model(tie_word_embeddings=True), Width(factor=2, untie=True))
    assert not grown.config.tie_word_embeddings
    assert grown.lm_head.weight is not grown.model.embed_tokens.weight


def test_a_tied_transformers_model_cannot_stay_tied_as_it_grows_wider():
    with pytest.raises(ValueError, match=r"logit_scale=0\.5.*untie=true"):
        grow_model(random_model(tie_word_embeddings=True), Width(factor=2))


def test_experts_have_no_place_in_a_transformers_model():
    with pytest.raises(
        TypeError, match="LlamaForCausalLM has no place for experts: save it and grow the folder instead"
    ):
        grow_model(random_model(), Experts())


def test_models_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="can be grown, not a Linear"):
        grow_model(nn.Linear(2, 2), Gstack())
    mixtral = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))
    with pytest.raises(
        TypeError, match=r"not a MixtralForCausalLM; of transformers' mixtures of experts, grow the folder"
    ):
        grow_model(mixtral, Width())


def test_operators_and_grow_model_are_at_the_top_of_the_package():
    source = random_rack(tiny())
    for operator in (raygrow.Gstack(), raygrow.Depth(extra_layers=1), raygrow.Width(), raygrow.Experts()):
        grown = raygrow.grow_model(source, operator)
        assert isinstance(grown, raygrow.Rack)
        assert grown.config == operator.grow(source.config).config
        assert grown.training == source.training
