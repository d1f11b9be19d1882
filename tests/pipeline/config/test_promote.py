"""The section `promote`: defaults that a scheduled job can rely on, and mistakes told clearly."""

from __future__ import annotations

import pytest

from pipeline.config import PromoteConfig, load_recipe
from pipeline.errors import RecipeError


def promote(*overrides: str) -> PromoteConfig:
    given = [f"promote.{override}" for override in overrides]
    return load_recipe("emoji-demo", given, environment={}).promote


def test_a_recipe_that_says_nothing_is_judged_by_every_kind_of_rule() -> None:
    rules = promote()
    assert not rules.unjudged and rules.level == 0.02
    assert rules.improve and rules.keep and rules.limits and rules.slices
    assert {of for rule in rules.slices for of in rule.of} == {
        "language",
        "style",
        "topic",
        "words",
    }


def test_rules_are_read_from_a_recipe_and_replace_the_defaults() -> None:
    rules = promote(
        "improve=[{metric: imagenet_r5/unseen, by: 0.02}, {metric: size_mb, by: 5}]",
        "limits=[{metric: latency_s, at_most: 2}, {metric: 'kid/style:noto', at_most: 0.1}]",
        "slices=[{metric: kid, of: [style], margin: 0.02}]",
    )
    assert [rule.metric for rule in rules.improve] == ["imagenet_r5/unseen", "size_mb"]
    assert rules.improve[0].by == 0.02 and rules.limits[0].at_most == 2.0
    assert rules.slices[0].of == ("style",) and len(rules.keep) == len(promote().keep)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "keep=[{metric: sharpnes/all, margin: 0.1}]",
            "'sharpnes'; did you mean 'sharpness'",
        ),
        ("keep=[{metric: imagnet_r1/all, margin: 0.1}]", "did you mean 'imagenet_r1'"),
        ("improve=[{metric: kid}]", "'kid' does not say of which images: write 'kid/all'"),
        ("improve=[{metric: kid/unsen}]", "no slice 'unsen'.*did you mean 'unseen'"),
        (
            "improve=[{metric: kid/unseen}, {metric: kid/unseen, by: 1}]",
            "lists kid/unseen more than",
        ),
        ("improve=[{metric: latency_s}]", "'latency_s' is measured once"),
        ("improve=[{metric: fid/all}]", "'fid' is measured once"),
        ("improve=[{metric: recall/all}]", "'recall' depends on all images together"),
        ("slices=[{metric: coverage}]", "'coverage' has no slices"),
        ("improve=[{metric: nearest/all}]", "better in neither direction"),
        ("improve=[]", "at least 1 item"),
        ("keep=[{metric: size_mb/all, margin: 1}]", "write it without '/all'"),
        ("keep=[{metric: kid/all, margin: .nan}]", "finite number"),
        ("keep=[{metric: kid/all, margin: .inf}]", "finite number"),
        ("keep=[{metric: kid/all, margin: -0.1}]", "greater than 0"),
        ("keep=[{metric: kid/all, by: 0.1}]", "unknown key 'promote.keep.0.by'"),
        ("limits=[{metric: copies/unseen}]", "either at_most or at_least"),
        ("limits=[{metric: copies/unseen, at_most: 1, at_least: 0}]", "either at_most or at_least"),
        ("slices=[{metric: imagenet_r1/all}]", "write 'imagenet_r1' alone"),
        ("slices=[{metric: kid}]", r"write of: \[style\]"),
        ("slices=[{metric: imagenet_r1, of: [colour]}]", "'language', 'style', 'topic' or 'words'"),
        ("choose_by=retrieval", "no measure 'retrieval'"),
        ("level=0.5", "less than 0.5"),
        ("level=0", "greater than 0"),
        ("min_kid_gain=0.1", "unknown key 'promote.min_kid_gain'"),
        ("model_name=mine-decisions", "another model's log of decisions"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(given: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        promote(given)


def test_a_list_with_a_mistake_in_it_is_not_called_empty() -> None:
    with pytest.raises(RecipeError) as error:
        promote("improve=[{metric: imagnet_r1/all}]")
    assert "did you mean" in str(error.value) and "at least 1 item" not in str(error.value)
