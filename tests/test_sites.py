"""The grammar of sites, their order, and patterns over them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ir.errors import FluxIRError
from flux_ir.sites import Site, all_sites, as_site, block_outputs, match_sites, sites_among, sites_of, text_sites

blocks = st.integers(0, 99)
doubles = st.builds(
    Site,
    st.just("double"),
    blocks,
    st.sampled_from(["img", "txt"]),
    st.sampled_from([None, "q", "k", "attn", "mlp", "neurons", "update"]),
)
singles = st.builds(
    Site,
    st.just("single"),
    blocks,
    st.sampled_from([None, "img", "txt"]),
    st.sampled_from([None, "q", "k", "attn", "neurons", "update", "out"]),
)


layers = st.builds(Site, st.sampled_from(["t5", "clip"]), blocks)


@given(doubles | singles | layers)
def test_parsing_a_sites_name_gives_the_site_back(site):
    assert Site.parse(str(site)) == site


@given(st.text(alphabet="doublesinge.img0123txt5cp* ", max_size=20))
def test_whatever_parses_has_this_name(text):
    try:
        site = Site.parse(text)
    except FluxIRError:
        return
    assert str(site) == text


@given(doubles, doubles, singles, singles)
def test_order_is_by_depth(double, other_double, single, other_single):
    assert double < single
    for one, other in ((double, other_double), (single, other_single)):
        if one.block != other.block:
            assert (one < other) == (one.block < other.block)


def test_order_is_numeric_and_images_come_first():
    names = ["single.0", "double.10.txt", "double.10.img", "double.2.txt", "single.10", "single.2", "single.2.img"]
    assert [str(site) for site in sorted(map(Site.parse, names))] == [
        "double.2.txt",
        "double.10.img",
        "double.10.txt",
        "single.0",
        "single.2",
        "single.2.img",
        "single.10",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "double.1",  # its streams are apart
        "double.1.img.out",
        "single.1.mlp",
        "double.1.attn",
        "double.1.v",
        "single.01",
        "single.-1",
        "single.1.img.",
        "triple.1",
        "double.1.img.img",
        " single.1",
        "single.1\n",
        "single.\N{ARABIC-INDIC DIGIT ONE}",
        "t5.1.img",
        "clip.1.mlp",
        "clip.image",
        "t5",
    ],
)
def test_what_is_no_site_is_refused_with_the_grammar(text):
    with pytest.raises(FluxIRError) as caught:
        Site.parse(text)
    assert "double.18.img" in str(caught.value)
    if text.startswith("double.1.img.out"):
        assert "attn, mlp, neurons, update" in caught.value.message


def test_a_network_has_every_site_of_the_grammar_once():
    sites = all_sites(2, 3)
    assert len(sites) == len(set(sites)) == 2 * (2 * 7 + 2) + 3 * 3 * 7
    assert sites == sorted(sites)
    assert {site.block for site in sites if site.kind == "double"} == {0, 1}
    assert {site.block for site in sites if site.kind == "single"} == {0, 1, 2}


def test_text_encoders_come_before_the_transformer_and_t5_first():
    names = ["double.0.img", "clip.10", "single.0", "clip.2", "t5.11", "t5.9"]
    expected = ["t5.9", "t5.11", "clip.2", "clip.10", "double.0.img", "single.0"]
    assert [str(site) for site in sorted(map(Site.parse, names))] == expected
    assert list(map(str, text_sites(2, 1))) == ["t5.0", "t5.1", "clip.0"]
    assert {site.per_prompt for site in text_sites(2, 1)} == {True}
    assert {site.per_prompt for site in all_sites(2, 3)} == {False}


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("t5.*", ["t5.0", "t5.1", "t5.2"]),
        ("clip.?, single.0", ["clip.0", "clip.1", "single.0"]),
        ([Site("clip", 1), "t5.2"], ["t5.2", "clip.1"]),
        ("*.0", ["single.0"]),
    ],
)
def test_layers_of_text_encoders_are_matched_by_patterns_that_name_them(sites, expected):
    """`*` means the transformer: a layer of T5 is as large as a picture's tokens, and not every job encodes prompts."""
    available = [*text_sites(3, 2), *all_sites(1, 1)]
    assert list(map(str, sites_among(sites, available))) == expected
    assert sites_among("*", available) == match_sites(["*"], all_sites(1, 1))


def test_a_layer_that_is_not_there_is_named_with_the_nearest():
    available = [*text_sites(3, 2), *all_sites(1, 1)]
    with pytest.raises(FluxIRError, match=r"no site of this model matches 't5\.7'.*t5\.[012]"):
        sites_among("t5.7", available)
    with pytest.raises(FluxIRError, match=r"this model has no site clip\.2 .*clip\.[01]"):
        sites_among(Site("clip", 2), available)


@pytest.mark.parametrize("sites", ["t5.*", "clip.1", [Site("t5", 0)]])
def test_text_encoders_are_not_looked_for_in_the_transformer(sites):
    with pytest.raises(FluxIRError, match=r"of a text encoder, not of the transformer .*once per prompt"):
        sites_of(sites, 2, 3)


def test_block_outputs_are_both_streams_of_double_blocks_then_whole_single_blocks():
    assert list(map(str, block_outputs(2, 1))) == [
        "double.0.img",
        "double.0.txt",
        "double.1.img",
        "double.1.txt",
        "single.0",
    ]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["double.*.img"], [f"double.{i}.img" for i in range(3)]),
        (["single.1?"], ["single.10", "single.11"]),
        (["single.1"], ["single.1"]),
        (["single.1.img"], ["single.1.img"]),
        (["single.1[01].txt"], ["single.10.txt", "single.11.txt"]),
        (["single.11", "double.2.txt", "double.2.txt", "single.2"], ["double.2.txt", "single.2", "single.11"]),
        (["single.4.*t"], ["single.4.out", "single.4.txt"]),
        (["single.4", "single.4.img"], ["single.4", "single.4.img"]),
        (["[ds]*.0.*.mlp"], ["double.0.img.mlp", "double.0.txt.mlp"]),
    ],
)
def test_patterns_match_in_depth_order_and_halves_only_by_name(patterns, expected):
    available = all_sites(3, 12)
    random.Random(0).shuffle(available)
    assert list(map(str, match_sites(patterns, available))) == expected


def test_queries_and_keys_are_of_text_and_image_together_in_both_kinds_of_block():
    found = match_sites(["*.q", "double.0.img.k"], all_sites(1, 1))
    assert list(map(str, found)) == ["double.0.q", "double.0.img.k", "single.0.q"]
    assert Site.parse("double.0.img.k").whole == Site.parse("double.0.k")
    assert [Site.parse(name).in_residual for name in ("double.0.img.attn", "single.0.attn", "double.0.q")] == [
        True,
        False,
        False,
    ]


def test_every_update_is_matched_without_halves():
    found = match_sites(["*.update"], all_sites(1, 2))
    assert list(map(str, found)) == ["double.0.img.update", "double.0.txt.update", "single.0.update", "single.1.update"]


def test_a_pattern_that_matches_nothing_names_the_nearest_sites():
    with pytest.raises(FluxIRError) as caught:
        match_sites(["single.*", "double.1.imgs"], all_sites(2, 2))
    assert "'double.1.imgs'" in caught.value.message
    assert "double.1.img" in (caught.value.hint or "")


def test_the_whole_of_a_half_is_the_block():
    assert Site.parse("single.3.img.out").whole == Site.parse("single.3.out")
    assert Site.parse("double.3.img").whole == Site.parse("double.3.img")


@pytest.mark.parametrize(
    ("sites", "names"),
    [
        ("single.1", ["single.1"]),
        ("single.2.img, double.*.img", ["double.0.img", "double.1.img", "single.2.img"]),
        (Site("single", 1), ["single.1"]),
        (["single.1", Site("double", 0, "txt"), "single.1"], ["single.1", "double.0.txt"]),
        ((), []),
    ],
)
def test_sites_are_given_as_text_or_as_sites_one_or_several(sites, names):
    assert [str(site) for site in sites_of(sites, 2, 3)] == names


@pytest.mark.parametrize("sites", ["single.3", Site("single", 3), ["single.0", "double.5.*"]])
def test_sites_that_a_model_does_not_have_are_refused_however_they_are_given(sites):
    with pytest.raises(FluxIRError):
        sites_of(sites, 2, 3)


def test_one_site_is_given_as_text_or_as_a_site():
    assert as_site("single.9.img") == as_site(Site("single", 9, "img")) == Site.parse("single.9.img")


@pytest.mark.parametrize("name", ["double.3.img.mlp", "single.9"])
def test_a_site_is_shown_by_its_name(name):
    assert repr([Site.parse(name)]) == f"[Site.parse('{name}')]"
