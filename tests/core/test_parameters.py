"""Roles of parameters: declared once, kept by copies, and an error with a name where one is missing."""

import copy

import pytest
import torch
from torch import nn

from pgolf_core.config import RunConfig
from pgolf_core.export import quantize_state
from pgolf_core.knobs import ModelConfig
from pgolf_core.model import GPT, roles, roles_by_name
from pgolf_core.optim import make_optimizers
from pgolf_core.parameters import CONTROL, EMBEDDING, HEAD, Role, RoleError, declare, matrix, roles_of, tensor_place
from pgolf_core.regularizers import CompressionRegularizer

SMALL = dict(vocab_size=16, num_layers=3, model_dim=8, num_heads=2, num_kv_heads=1)


def test_every_parameter_of_the_model_has_the_role_it_was_created_with():
    controls = ["skip_weights", "q_gains", "attn_scales", "mlp_scales", "resid_mixes"]
    tables = {"tok_emb.weight": EMBEDDING, "tok_emb_proj.weight": matrix("embed"), "lm_head.weight": HEAD}
    groups = {
        "attn.c_q": "attn_in", "attn.c_k": "attn_in", "attn.c_v": "attn_in", "attn.proj": "attn_out",
        "mlp.fc": "mlp_in", "mlp.proj": "mlp_out",
    }  # fmt: skip
    blocks = {f"blocks.{i}.{part}.weight": Role("matrix", group, i) for i in range(3) for part, group in groups.items()}
    expected = dict.fromkeys(controls, CONTROL) | tables | blocks
    assert roles(ModelConfig(**SMALL, embed_dim=4, tie_embeddings=False)) == expected


def test_roles_by_name_are_the_models_at_any_depth_and_unknown_names_are_errors():
    generated = dict(weights="basis", weight_bases=11, weight_rank=2, weight_row_scale=True)
    for options in ({}, generated, generated | dict(weights="hypernetwork")):
        known = roles(ModelConfig(**SMALL | dict(num_layers=12) | options))
        assert roles_by_name(known) == known
    with pytest.raises(RoleError, match=r"tensor bigram\.weight is none"):
        roles_by_name(["bigram.weight"])


def test_copies_and_moves_keep_roles():
    model = GPT(ModelConfig(**SMALL))
    expected = roles_of(model)
    assert roles_of(copy.deepcopy(model)) == roles_of(model.double().to("meta")) == expected


def test_an_undeclared_parameter_is_an_error_with_its_name(tmp_path):
    model, config = GPT(ModelConfig(**SMALL)), RunConfig(track="nano", **SMALL)
    model.blocks[1].gate = nn.Linear(8, 8, bias=False)
    for use in (
        lambda: roles_of(model),
        lambda: make_optimizers(model, config),
        lambda: CompressionRegularizer(model, config),
        lambda: quantize_state(model.state_dict(), config.export),
    ):
        with pytest.raises(RoleError, match=r"blocks\.1\.gate\.weight"):
            use()
    declare(model.blocks[1].gate, matrix("mlp_in"))
    assert roles_of(model)["blocks.1.gate.weight"] == Role("matrix", "mlp_in", block=1)


def test_a_persistent_buffer_is_part_of_the_file_so_it_is_declared_too():
    model = GPT(ModelConfig(**SMALL))
    model.register_buffer("table", torch.zeros(3), persistent=False)
    roles_of(model)
    model.register_buffer("steps", torch.zeros(3))
    with pytest.raises(RoleError, match="steps"):
        roles_of(model)
    assert roles_of(declare(model, CONTROL, "steps"))["steps"] == CONTROL


def test_what_cannot_be_declared_says_why():
    with pytest.raises(RoleError, match="choose one of embed, attn_in"):
        matrix("attention")
    with pytest.raises(RoleError, match="Linear has no parameter bias"):
        declare(nn.Linear(2, 2, bias=False), CONTROL, "bias")
    model = nn.ModuleDict({"norm": declare(nn.LayerNorm(4), EMBEDDING)})
    with pytest.raises(RoleError, match=r"norm\.weight of shape \(4,\)"):
        roles_of(model)


def test_tensor_place():
    places = {"blocks.3.mlp.fc.weight": (3, "mlp.fc"), "tok_emb.weight": (None, "tok_emb"), "gains": (None, "gains")}
    assert {name: tensor_place(name) for name in places} == places
