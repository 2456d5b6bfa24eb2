import json

import pytest

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import SAEConfig


def test_config_survives_json():
    config = SAEConfig("matryoshka", 16, 64, k=4, prefixes=(8, 64), steps=(0, 3), site="single.6.img", target_l0=3.0)
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": 65}, "got k 65 of 64"),
        ({"k": 0}, "k must be at least 1: got 0"),
        ({"d_in": 0}, "d_in must be at least 1: got 0"),
        ({"d_sae": -3}, "d_sae must be at least 1: got -3"),
        ({"k_aux": -1}, "k_aux must be at least 0: got -1"),
        ({"architecture": "top_k"}, "the nearest is topk"),
        ({"bias_init": "geometric"}, "the nearest is geometric_median"),
        ({"prefixes": (8, 32)}, "prefixes must ascend from at least 1 to d_sae = 64: got [8, 32]"),
        ({"prefixes": (8, 8, 64)}, "got [8, 8, 64]"),
        ({"prefixes": (0, 64)}, "got [0, 64]"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0: got 0.0"),
        ({"target_l0": -1.0}, "target_l0 must be above 0"),
        ({"l1_coefficient": float("nan")}, "l1_coefficient must be a number of at least 0: got nan"),
        ({"threshold_decay": 1.0}, "threshold_decay must be in [0, 1): got 1.0"),
        ({"tied": True, "encoder_init": "random"}, "tied weights start as the decoder transposed: got encoder_init"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, says):
    with pytest.raises(FluxIRError) as caught:
        SAEConfig.from_dict({"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 4, **fields})
    assert says in str(caught.value)
    assert caught.value.hint


def test_an_architecture_without_k_takes_any_k():
    assert SAEConfig("l1", 4, 8).k == 32


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(FluxIRError, match="it lacks d_sae; it has bandwith"):
        SAEConfig.from_dict({"architecture": "l1", "d_in": 4, "bandwith": 0.1})


def test_auxiliary_features_default_to_half_the_width():
    assert SAEConfig("topk", 16, 64, k=2).aux_features == 8
    assert SAEConfig("topk", 16, 5, k=2).aux_features == 5
    assert SAEConfig("topk", 16, 64, k=2, k_aux=0).aux_features == 0


def test_nested_sizes_end_with_the_whole_dictionary():
    assert SAEConfig("matryoshka", 4, 64, k=2).nested_sizes == (4, 8, 16, 32, 64)
    assert SAEConfig("matryoshka", 4, 3, k=2).nested_sizes == (1, 2, 3)
    assert SAEConfig("matryoshka", 4, 64, k=2, prefixes=(1, 64)).nested_sizes == (1, 64)


def test_the_l1_penalty_weighs_as_much_of_the_loss_at_every_width():
    assert SAEConfig("l1", 625, 8).l1_weight == 5
    assert SAEConfig("l1", 100, 8).l1_weight == 2
    assert SAEConfig("l1", 100, 8, l1_coefficient=3.0).l1_weight == 3


def test_the_l0_penalty_weighs_one_with_a_target():
    assert SAEConfig("jumprelu", 4, 8, target_l0=2.0).l0_weight == 1
    assert SAEConfig("jumprelu", 4, 8).l0_weight == 0.001
    assert SAEConfig("jumprelu", 4, 8, l0_coefficient=0.5).l0_weight == 0.5
