"""Configs: overrides, loading, and the hash that guards a resumed run."""

import json
from dataclasses import replace
from functools import partial, reduce

import pytest

import madjax
from madjax import InputError, Sweep, config, store

pytestmark = pytest.mark.smoke

BASE = Sweep(name="base", dataset="embedded:mnist", queryset="embedded:fashion_mnist")


@pytest.mark.parametrize(
    ("assignment", "get", "want"),
    [
        ("dataset=mnist[:5000]", lambda c: c.dataset, "mnist[:5000]"),
        ("epsilons=0,0.5", lambda c: c.epsilons, (0.0, 0.5)),
        ("epsilons=(1,)", lambda c: c.epsilons, (1.0,)),
        ("seeds=3", lambda c: c.seeds, (3,)),
        ("attacks.recipe.epochs=5", lambda c: c.attacks[0].recipe.epochs, 5),
        ("attacks.recipe.learning_rate=1", lambda c: c.attacks[0].recipe.learning_rate, 1.0),
        ("defense.layers=last", lambda c: c.defense.layers, "last"),
        ("defense.solver.distance=madjax.l2", lambda c: c.defense.solver.distance, madjax.l2),
        ("query_splits=train, test", lambda c: c.query_splits, ("train", "test")),
        ("name = spaced ", lambda c: c.name, "spaced"),
        ("budgets=10,100", lambda c: c.budgets, (10, 100)),
        ("attacks.targets=madjax.top_label", lambda c: c.attacks[0].targets, madjax.top_label),
        ("defense.strengths=0.3,1", lambda c: c.defense.strengths, (0.3, 1.0)),
    ],
)
def test_override_replaces_one_field(assignment, get, want):
    changed = config.override(BASE, assignment)
    assert get(changed) == want
    assert type(get(changed)) is type(want)
    before, after = (dict(store._flatten(config.describe(c))) for c in (BASE, changed))
    differing = [k for k, v in before.items() if after[k] != v]
    assert differing == [assignment.split("=")[0].strip().replace("attacks.", "attacks.0.")]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("epsilons", "write it as field=value"),
        ("=3", "write it as field=value"),
        ("epsilon=0.5", "no field 'epsilon'; choose one of name, dataset"),
        ("attacks.recipe.speed=1", "no field 'speed'; choose one of epochs"),
        ("seeds.first=1", "the field before it has no parts"),
        ("seeds=0.5", "the field takes int"),
        ("victim=5", "holds a section"),
        ("attacks=madjax.MAD", "makes MAD, which is no Attack"),
        ("attacks=madjax.attacks.draw", "cannot be called without arguments"),
        ("attacks=madjax.Knockoff,madjax.Knockoff", "a name and variant of its own"),
        ("attacks=madjax.jbda,madjax.jbxx", "'madjax.jbxx' cannot be imported"),
        ("budgets=0.5", "the field takes int"),
        ("budgets=0", "budget is 0"),
        ("attacks.recipe.epochs=many", "the field takes int"),
        ("attacks.recipe.epochs=True", "the field takes int"),
        ("attacks.recipe.epochs=0", "epochs is 0"),
        ("epsilons=0,-0.5", r"epsilon is -0\.5"),
        ("epsilons=", "the field takes float"),
        ("epsilons=0.5,0.5", "each once"),
        ("epsilons=0.99,0.99000000001", "each once"),
        ("epsilons=1e39", r"epsilon is 1e\+39"),
        ("seeds=4294967296", "seed is 4294967296"),
        ("attacks.recipe.optimizer=optax.adam", "does not take learning_rate"),
        ("seeds=-1", "seed is -1"),
        ("query_splits=valid", "holds 'valid'"),
        ("defense.solver.distance=l7", "cannot be imported"),
        ("defense=madjax.MAD,madjax.MAD", "each with settings or a variant of its own"),
        ("defense=madjax.jbda", "makes JacobianAugmentation, which is no Defense"),
        ("defense=madjax.ReverseSigmoid", r"epsilon is 1\.1: the strength of reverse_sigmoid"),
        ("defense.strengths=0.5,0.5", "strengths of mad, all, extreme, l1 is .* each once"),
        ("defense.gamma=0.5", "no field 'gamma'; choose one of strengths"),
        ("defense.solver.distance=madjax.constraints.l7", "cannot be imported"),
        (
            "defense.oracle=madjax.argmax_preserving",
            "choose one of strengths, variant, layers, solver",
        ),
        ("defense.solver=madjax.Knockoff", "makes Knockoff, which is no Solver"),
        ("defense.solver=ascend", "give the import path of a class that makes one"),
        ("attacks=madjax.Recipe", "makes Recipe, which is no Attack"),
    ],
)
def test_a_bad_override_is_one_clear_line(assignment, words):
    with pytest.raises(InputError, match=words) as caught:
        config.override(BASE, assignment)
    assert "\n" not in str(caught.value)


def test_several_defences_from_the_command_line():
    chosen = reduce(
        config.override,
        (
            "epsilons=0,0.5",
            "defense=madjax.Undefended,madjax.MAD,madjax.ReverseSigmoid",
            "defense.gamma=0.4",  # of those that have it
            "defense.layers=last",
        ),
        BASE,
    )
    none, mad, reverse = chosen.defenses
    assert (mad.layers, reverse.gamma) == ("last", 0.4)
    assert [chosen.strengths_of(d) for d in (none, mad, reverse)] == [(0.0,), (0, 0.5), (0, 0.5)]
    with pytest.raises(InputError, match="no field 'speed'"):
        config.override(chosen, "defense.speed=1")


def test_an_attack_by_its_import_path_keeps_the_budget_and_the_training():
    config_ = reduce(
        config.override,
        (
            "attacks.budget=700",
            "attacks.recipe.epochs=3",
            "attacks=madjax.jbda, madjax.attacks.jbtop",
            "attacks.seeds=50",
            "attacks.as_published_code=True",
        ),
        BASE,
    )
    assert [a.title for a in config_.attacks] == ["jbda", "jbtop3"]
    for attack in config_.attacks:
        assert (attack.budget, attack.recipe.epochs, attack.seeds) == (700, 3, 50)
        assert attack.label.endswith("(as published code)")
    custom = config.override(BASE, "attacks=madjax.attacks.Custom")
    with pytest.raises(InputError, match=r"such as my_module\.my_function"):
        config.override(custom, "attacks.collect=no.such_function")
    assert config.override(custom, "attacks.collect=madjax.fit").attacks[0].collect is madjax.fit
    adaptive = config.override(BASE, "attacks=madjax.AdaptiveKnockoff")
    rewards = "attacks.rewards=madjax.attacks.disagreement,madjax.attacks.certainty"
    chosen = config.override(adaptive, rewards)
    assert [r.__name__ for r in chosen.attacks[0].rewards] == ["disagreement", "certainty"]


@pytest.mark.parametrize(
    ("attacks", "words"),
    [
        (madjax.Knockoff(), r"attacks is Knockoff.*give a tuple, such as \(Knockoff\(\),\)"),
        ((madjax.MAD(),), r"attacks holds MAD.*not a madjax\.Attack"),
        ((), "attacks holds nothing"),
    ],
)
def test_attacks_are_a_tuple_of_attacks(attacks, words):
    with pytest.raises(InputError, match=words):
        replace(BASE, attacks=attacks)


def test_shipped_configs_load_and_say_their_claim_command_and_cost():
    shipped = config.shipped_configs()
    assert {"quickstart", "mnist_knockoff"} <= set(shipped)
    for name, path in shipped.items():
        assert config.load(name).name == name
        # described, since two functools.partial of the same function are never equal
        by_name, by_path, by_file = map(config.load, (name, f"configs/{name}.py", str(path)))
        assert config.describe(by_name) == config.describe(by_path) == config.describe(by_file)
        for word in ("Claim:", "Command:", "Cost:"):
            assert word in path.read_text()


def test_a_users_own_file_loads(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from madjax import Sweep\n"
        "def config():\n"
        "    return Sweep(name='mine', dataset='a', queryset='b')\n"
    )
    assert config.load(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def config(): return 3", "returns int"),
        ("x = 1", "AttributeError"),
        ("def config(:", "SyntaxError"),
        (
            "from madjax import Sweep\n"
            "def config(): return Sweep(name='a', dataset='a', queryset='b', epsilons=(-1.0,))",
            r"epsilon is -1\.0",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        config.load(str(path))


def test_a_missing_config_lists_the_shipped_ones():
    for name in ("nothing", "nothing.py", "elsewhere/quickstart.py"):
        with pytest.raises(InputError, match=r"does not exist.*quickstart"):
            config.load(name)


def test_a_function_without_an_import_path_is_refused():
    with pytest.raises(InputError, match="no import path"):
        config.describe(replace(BASE, architecture=lambda classes: madjax.LeNet(classes)))


def test_partial_functions_are_described_whole():
    described = config.describe(partial(madjax.LeNet, num_classes=3))
    assert described == {
        "function": "madjax.models.LeNet",
        "arguments": [],
        "keywords": {"num_classes": 3},
    }
    assert config.name_of(partial(madjax.LeNet, num_classes=3)) == "LeNet"


def test_hash_sees_every_value_and_survives_json():
    description = config.describe(BASE)
    assert config.digest(json.loads(json.dumps(description))) == config.digest(description)
    for change in ({"seeds": (1,)}, {"name": "other"}, {"defense": madjax.MAD(layers="last")}):
        assert config.digest(config.describe(replace(BASE, **change))) != config.digest(description)


def test_functions_are_described_by_where_they_live():
    assert config.describe(BASE)["defense"]["solver"]["oracle"] == "madjax.mad.extreme"
    assert config.describe(BASE)["architecture"] == "madjax.models.LeNet"
