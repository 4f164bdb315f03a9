"""Configs: overrides, loading, and the hash that guards a resumed run."""

import functools
import importlib
import json
import linecache
import math
import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import madjax
from madjax import (
    DPSGD,
    MAD,
    AngleStudy,
    Defended,
    Defense,
    InputError,
    JacobianAugmentation,
    Knockoff,
    NoDefense,
    Online,
    Recipe,
    ReverseSigmoid,
    Sweep,
    Task,
    Trained,
    config,
    datasets,
    jbda,
    store,
)
from madjax.config.names import is_own, named

pytestmark = pytest.mark.smoke

TASK = Task("embedded:mnist", "embedded:fashion_mnist")
BASE = Sweep("base", (TASK,), (Defended(MAD()),))
SEVERAL = Sweep(
    "several",
    (TASK, replace(TASK, dataset="embedded:fashion_mnist", victim_seed=1)),
    (Defended(NoDefense()), Defended(MAD(), (0.5,)), Defended(MAD(layers="last"), (0.5,))),
    (Knockoff(budget=100), jbda(budget=200)),
)


@pytest.mark.parametrize(
    ("assignment", "get", "want"),
    [
        ("tasks.dataset=mnist[:5000]", lambda c: c.tasks[0].dataset, "mnist[:5000]"),
        ("defenses.strengths=0,0.5", lambda c: c.defenses[0].strengths, (0.0, 0.5)),
        ("defenses.strengths=(1,)", lambda c: c.defenses[0].strengths, (1.0,)),
        ("seeds=3", lambda c: c.seeds, (3,)),
        ("attacks.recipe.epochs=5", lambda c: c.attacks[0].recipe.epochs, 5),
        ("attacks.recipe.learning_rate=1", lambda c: c.attacks[0].recipe.learning_rate, 1.0),
        ("defenses.rule.layers=last", lambda c: c.defenses[0].rule.layers, "last"),
        (
            "defenses.rule.solver.distance=madjax.l2",
            lambda c: c.defenses[0].rule.solver.distance,
            madjax.l2,
        ),
        ("tasks.query_splits=train, test", lambda c: c.tasks[0].query_splits, ("train", "test")),
        ("tasks.0.victim_seed=3", lambda c: c.tasks[0].victim_seed, 3),
        ("name = spaced ", lambda c: c.name, "spaced"),
        ("budgets=10,100", lambda c: c.budgets, (10, 100)),
        ("attacks.targets=madjax.top_label", lambda c: c.attacks[0].targets, madjax.top_label),
    ],
)
def test_override_replaces_one_field(assignment, get, want):
    changed = config.override(BASE, assignment)
    assert get(changed) == want
    assert type(get(changed)) is type(want)
    before, after = (dict(store._flatten(config.describe(c))) for c in (BASE, changed))
    differing = [k for k, v in before.items() if after[k] != v]
    wanted = re.sub(r"^(\w+s)\.(?=[a-z])", r"\1.0.", assignment.split("=")[0].strip())
    assert differing == [wanted]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("seeds", "write it as field=value"),
        ("=3", "write it as field=value"),
        ("epsilon=0.5", "no field 'epsilon'; choose one of name, tasks"),
        ("attacks.recipe.speed=1", "no field 'speed'; choose one of epochs"),
        ("seeds.first=1", "the field before it has no parts"),
        ("seeds=0.5", "the field takes int"),
        ("tasks.victim=5", "holds a section"),
        ("attacks=madjax.MAD", "makes MAD, which is no Attack"),
        ("attacks=madjax.attacks.draw", "cannot be called without arguments"),
        ("attacks=madjax.Knockoff,madjax.Knockoff", "a variant of its own"),
        ("attacks=madjax.jbda,madjax.jbxx", "'madjax.jbxx' cannot be imported"),
        ("budgets=0.5", "the field takes int"),
        ("budgets=0", "budget is 0"),
        ("attacks.recipe.epochs=many", "the field takes int"),
        ("attacks.recipe.epochs=True", "the field takes int"),
        ("attacks.recipe.epochs=0", "epochs is 0"),
        ("defenses.strengths=0,-0.5", r"strength is -0\.5"),
        ("defenses.strengths=", "the field takes float"),
        ("defenses.strengths=0.5,0.5", "each once"),
        ("defenses.strengths=0.99,0.99000000001", "each once"),
        ("defenses.strengths=1e39", r"strength is 1e\+39"),
        ("seeds=4294967296", "seed is 4294967296"),
        ("attacks.recipe.optimizer=optax.adam", "does not take learning_rate"),
        ("seeds=-1", "seed is -1"),
        ("tasks.query_splits=valid", "holds 'valid'"),
        ("defenses.rule.solver.distance=l7", "cannot be imported"),
        ("defenses=madjax.MAD,madjax.MAD", "with settings or a variant of its own"),
        ("defenses=madjax.jbda", "makes JacobianAugmentation, which is no Defended"),
        ("defenses.rule=madjax.ReverseSigmoid", r"strength is 1\.1: .* of reverse_sigmoid"),
        ("defenses.rule.gamma=0.5", "no field 'gamma'; choose one of variant"),
        ("defenses.rule.solver.distance=madjax.constraints.l7", "cannot be imported"),
        (
            "defenses.rule.oracle=madjax.argmax_preserving",
            "choose one of variant, layers, solver",
        ),
        ("defenses.rule.solver=madjax.Knockoff", "makes Knockoff, which is no Solver"),
        ("defenses.rule.solver=ascend", "give the import path of a class that makes one"),
        ("attacks=madjax.Recipe", "makes Recipe, which is no Attack"),
    ],
)
def test_a_bad_override_is_one_clear_line(assignment, words):
    with pytest.raises(InputError, match=words) as caught:
        config.override(BASE, assignment)
    assert "\n" not in str(caught.value)


def test_a_field_that_may_be_none_from_the_command_line():
    chosen = replace(BASE, defenses=(Defended(MAD(), (0.5,)), Defended(DPSGD(), (1.0,))))
    assert chosen.defenses[1].rule.recipe is None
    for assignment, get, want in (
        ("defenses.mad.rule.surrogate_epochs=None", lambda r: r[0].surrogate_epochs, None),
        ("defenses.mad.rule.surrogate_epochs=3", lambda r: r[0].surrogate_epochs, 3),
        ("defenses.dp_sgd.rule.recipe=madjax.Recipe", lambda r: r[1].recipe, Recipe()),
        ("defenses.dp_sgd.rule.recipe.epochs=2", lambda r: r[1].recipe.epochs, 2),
        ("defenses.dp_sgd.rule.recipe=None", lambda r: r[1].recipe, None),
    ):
        chosen = config.override(chosen, assignment)
        assert get([each.rule for each in chosen.defenses]) == want
    with pytest.raises(InputError, match="the field takes int, like 3"):
        config.override(chosen, "defenses.mad.rule.surrogate_epochs=some")


def test_several_defences_from_the_command_line():
    chosen = reduce(
        config.override,
        (
            "defenses=madjax.NoDefense,madjax.MAD,madjax.ReverseSigmoid",
            "defenses.mad.strengths=0,0.5",
            "defenses.rule.gamma=0.4",  # of those that have it
            "defenses.1.rule.layers=last",
        ),
        BASE,
    )
    none, mad, reverse = chosen.defenses
    assert (mad.rule.layers, reverse.rule.gamma) == ("last", 0.4)
    assert [each.strengths for each in (none, mad, reverse)] == [
        (0.0,),
        (0.0, 0.5),
        ReverseSigmoid().usual,
    ]
    with pytest.raises(InputError, match="no field 'speed'"):
        config.override(chosen, "defenses.rule.speed=1")


@pytest.mark.parametrize(
    ("assignment", "get", "want"),
    [
        ("tasks.1.victim.epochs=3", lambda c: [t.victim.epochs for t in c.tasks], [30, 3]),
        ("tasks.mnist.victim_seed=7", lambda c: [t.victim_seed for t in c.tasks], [7, 1]),
        ("tasks.queryset=a", lambda c: [t.queryset for t in c.tasks], ["a", "a"]),
        ("attacks.jbda.budget=500", lambda c: [a.budget for a in c.attacks], [100, 500]),
        ("attacks.1=madjax.jbself", lambda c: [a.title for a in c.attacks], ["knockoff", "jbself"]),
        ("attacks.seeds=20", lambda c: c.attacks[1].seeds, 20),
        # a name stands for all that have it
        ("defenses.mad.strengths=1", lambda c: [d.strengths for d in c.defenses[1:]], [(1.0,)] * 2),
        (
            "defenses.2=madjax.TopK",
            lambda c: [d.name for d in c.defenses],
            ["none", "mad", "top_k"],
        ),
        ("defenses.1.rule=madjax.ReverseSigmoid", lambda c: c.defenses[1].strengths, (0.5,)),
    ],
)
def test_one_of_several_is_meant_by_position_or_name(assignment, get, want):
    assert get(config.override(SEVERAL, assignment)) == want


def test_a_field_goes_before_a_name():
    chosen = replace(SEVERAL, attacks=(Knockoff(name="recipe"), jbda()))
    chosen = config.override(chosen, "attacks.recipe.epochs=3")
    assert [attack.recipe.epochs for attack in chosen.attacks] == [3, 3]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("tasks.2.victim_seed=1", "no number 2: give one from 0 to 1"),
        ("attacks.jbself.budget=9", "no field 'jbself'; choose one of budget"),
        ("attacks.seeds.0=1", "the field before it has no parts"),
        ("defenses.0.rule.layers=all", "no field 'layers'; choose one of variant"),
    ],
)
def test_what_is_not_there_is_named(assignment, words):
    with pytest.raises(InputError, match=words):
        config.override(SEVERAL, assignment)


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
        (madjax.Knockoff(), r"attacks is Knockoff.*give a tuple, such as \(madjax.Knockoff\(\),\)"),
        ((madjax.MAD(),), r"attacks holds MAD.*not a madjax\.Attack"),
        ((), "attacks holds nothing"),
    ],
)
def test_attacks_are_a_tuple_of_attacks(attacks, words):
    with pytest.raises(InputError, match=words):
        replace(BASE, attacks=attacks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": TASK}, r"tasks is Task.*give a tuple, such as \(madjax.Task"),
        ({"tasks": (TASK, TASK)}, "tasks holds mnist <- fashion_mnist; mnist <- .* each once"),
        ({"tasks": ()}, "tasks holds nothing"),
        ({"defenses": (MAD(),)}, "defenses holds MAD.*not a madjax.Defended: give one such as"),
        ({"defenses": (Defended(MAD(), (0.5,)), Defended(MAD(), (0.9,)))}, "defenses holds mad, "),
        ({"attacks": (Knockoff(variant=["a"]),)}, "cannot be told from others .unhashable type"),
        ({"seeds": (1, 1)}, "seeds holds 1; 1: give at least one, each once$"),
    ],
)
def test_the_parts_of_a_sweep_are_tuples_of_different_values(change, words):
    with pytest.raises(InputError, match=words):
        replace(BASE, **change)


@dataclass(frozen=True)
class MyOwnRule(Defense):
    """All that a defence needs."""

    def answer(self, key, y, evidence, strength):
        return y


@dataclass(frozen=True)
class Silent(MyOwnRule):
    def describe(self):
        return None


@dataclass(frozen=True)
class Short(MyOwnRule):
    def describe(self):
        return {name: "x" for name in super().describe() if name != "layers"}


@dataclass(frozen=True)
class Arrayed(MyOwnRule):
    def describe(self):
        return super().describe() | {"weights": np.arange(3)}


@dataclass(frozen=True)
class Nameless(Knockoff):
    def describe(self):
        return {"attack": "nameless"}


def test_a_rule_without_a_name_is_called_as_its_class():
    assert Defended(MyOwnRule(), (1.0,)).name == "my_own_rule"
    assert Defended(MyOwnRule(variant="a"), (1.0,)).label == "my_own_rule, a"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Defended(Silent(), (1.0,)), r"describe\(\) of Silent returns None, without"),
        (lambda: Defended(Short(), (1.0,)), "describe.. of Short returns .* without 'layers': re"),
        (
            lambda: Defended(Arrayed(), (1.0,)),
            "of Arrayed returns .*, of which a row can hold text",
        ),
        (lambda: replace(BASE, attacks=(Nameless(),)), "of Nameless returns .*, without 'variant'"),
    ],
)
def test_a_description_that_lacks_a_field_of_rows_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.fixture
def _weights(tmp_path, monkeypatch):
    """A file where some shipped configs have ImageNet's weights."""
    (tmp_path / "weights").mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "weights/vgg16_bn.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_weights")
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


@pytest.mark.usefixtures("_weights")
def test_networks_of_the_imagenet_family_start_from_what_lies_there():
    """Victims and attackers; `scratch` does without, and `smoke` is for a small machine."""
    for name in ("cub200", "caltech256"):
        whole, scratch, smoke = map(config.load, (name, f"{name}:scratch", f"{name}:smoke"))
        recipes = [whole.tasks[0].victim, *(attack.recipe for attack in whole.attacks)]
        assert {recipe.start for recipe in recipes} == {Trained("weights/vgg16_bn.safetensors")}
        assert scratch.tasks[0].victim.start is None
        assert smoke.tasks[0].dataset.startswith("caltech101_mini@256")
        assert whole.tasks[0].dataset == scratch.tasks[0].dataset != smoke.tasks[0].dataset
    Path("weights/vgg16_bn.safetensors").unlink()
    with pytest.raises(InputError, match=r"vgg16_bn\.safetensors is no file"):
        config.load("cub200")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cub200", "caltech256"])
@pytest.mark.usefixtures("_weights")
def test_attackers_have_the_architecture_of_the_victim(name):
    """As in the paper, in every form of the configs of its VGG16 families."""
    forms = {"cifar10": ["reduced"], "cifar100": []}.get(name, ["scratch"])
    for form in ("config", "smoke", *forms):
        chosen = config.load(f"{name}:{form}")
        (task,) = chosen.tasks
        for attack in chosen.attacks:
            same = map(config.describe, (attack.architecture, task.architecture))
            assert len(set(map(str, same))) == 1
            if isinstance(attack, JacobianAugmentation) and form == "config":
                assert attack.seeds == (1_000 if name == "cifar100" else 500)


def test_a_file_may_hold_several_configs(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from madjax import *\n"
        "def config():\n"
        "    task = Task('mnist', 'letters')\n"
        "    return Sweep('mine', (task,), (Defended(NoDefense()),))\n"
        "def smoke():\n"
        "    from dataclasses import replace\n"
        "    return replace(config(), name='mine_smoke')\n"
    )
    odd = tmp_path / "mine:smoke"
    for name, want in ((f"{path}:smoke", "mine_smoke"), (f"{path}:config", "mine")):
        assert config.load(name).name == want
    assert config.load("quickstart:config").name == "quickstart"
    with pytest.raises(
        InputError, match=r"fails with AttributeError: .*must define fast\(\), which"
    ):
        config.load(f"{path}:fast")
    with pytest.raises(InputError, match="config 'quickest' does not exist"):
        config.load("quickest:smoke")
    odd.write_text(
        path.read_text()
    )  # a file of that name is that file, though it is no Python file
    with pytest.raises(InputError, match="mine:smoke' is not a Python file"):
        config.load(str(odd))


def test_a_users_own_file_loads(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from madjax import MAD, Defended, Sweep, Task\n"
        "def config():\n"
        "    return Sweep('mine', (Task('a', 'b'),), (Defended(MAD()),))\n"
    )
    assert config.load(str(path)).name == "mine"


STUDY = AngleStudy(TASK, strengths=(0.0, 0.5), steps=60)


def test_a_study_is_the_sweep_of_its_attackers():
    batches = Online(refresh=5, recipe=replace(Online().recipe, batch_size=16))
    study = replace(STUDY, rules=(MAD(), MAD(layers="last")), attackers=(Online(), batches))
    assert study.sweep() == Sweep(
        "angle",
        (TASK,),
        (Defended(MAD(), (0.0, 0.5)), Defended(MAD(layers="last"), (0.0, 0.5))),
        (Online(budget=60), replace(batches, budget=960)),
    )


@pytest.mark.parametrize(
    ("assignment", "get", "want"),
    [
        ("steps=10", lambda s: s.attacks[0].budget, 10),
        ("strengths=0.5,1", lambda s: s.defenses[0].strengths, (0.5, 1.0)),
        ("task.dataset=mnist", lambda s: s.tasks[0].dataset, "mnist"),
        ("rules=madjax.ReverseSigmoid", lambda s: s.defenses[0].rule, ReverseSigmoid()),
        ("rules.layers=last", lambda s: s.defenses[0].rule.layers, "last"),
        ("attackers.refresh=0", lambda s: s.attacks[0].refresh, 0),
        ("attackers.online.recipe.batch_size=64", lambda s: s.attacks[0].budget, 3840),
    ],
)
def test_a_field_of_a_study_is_replaced(assignment, get, want):
    assert get(config.override(STUDY, assignment).sweep()) == want


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"task": (TASK,)}, "give a madjax.Task"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"rules": ()}, "rules holds nothing"),
        ({"attackers": ()}, "attackers holds nothing"),
        ({"attackers": (Online(), Online())}, "attackers holds online; online"),
        ({"seeds": 3}, r"seeds is 3: give a tuple, such as \(0,\)"),
        ({"seeds": (1, 1)}, "seeds holds 1; 1"),
        ({"rules": (Defended(MAD()),)}, "rules holds .* which is not a madjax.Defense"),
        ({"attackers": (Knockoff(),)}, "which is not a madjax.Online"),
        ({"attackers": (Online(budget=50),)}, "budget of 50: steps, which is 60, says how many"),
        ({"strengths": (-1.0,)}, "strength is -1.0"),
        ({"seeds": (-1,)}, "seed is -1"),
    ],
)
def test_a_study_that_cannot_be_followed_is_refused(change, wrong):
    with pytest.raises(InputError, match=wrong):
        replace(STUDY, **change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def config(): return 3", "returns int"),
        ("x = 1", "AttributeError"),
        ("def config(:", "SyntaxError"),
        (
            "from madjax import MAD, Defended\ndef config(): return Defended(MAD(), (-1.0,))",
            r"strength is -1\.0",
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
        config.describe(replace(TASK, architecture=lambda classes: madjax.LeNet(classes)))


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
    last = (Defended(MAD(layers="last")),)
    for change in ({"seeds": (1,)}, {"name": "other"}, {"defenses": last}):
        assert config.digest(config.describe(replace(BASE, **change))) != config.digest(description)


def test_functions_are_described_by_where_they_live():
    described = config.describe(BASE)
    assert described["defenses"][0]["rule"]["solver"]["oracle"] == "madjax.mad.extreme"
    assert described["tasks"][0]["architecture"] == "madjax.models.LeNet"


class Mix:
    """An object whose attributes decide what it does."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, y, gram):
        return y * self.weight


def scaled(weight):
    """A decorator that catches a number."""

    def wrap(oracle):
        @functools.wraps(oracle)
        def scale(y, gram):
            return weight * oracle(y, gram)

        return scale

    return wrap


def _same(y, gram):
    return y


tenth, nine_tenths, other_way = scaled(0.1)(_same), scaled(0.9)(_same), scaled(0.9)(madjax.extreme)


class Plain(MAD):
    """A rule without fields of its own, told from MAD by its class alone."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Mix(0.1), Mix(0.9)),
        (Mix(0.1).__call__, Mix(0.9).__call__),
        (tenth, nine_tenths),
        (nine_tenths, _same),
        (nine_tenths, other_way),
        (MAD(), Plain()),
        (partial(madjax.kl, weights=np.arange(3)), partial(madjax.kl, weights=np.arange(3) * 1.0)),
        (partial(madjax.kl, weights=np.arange(3)), partial(madjax.kl, weights=np.arange(3)[::-1])),
    ],
)
def test_values_of_one_class_or_without_fields_are_told_apart(one, other):
    first, second = (config.digest(config.describe(each)) for each in (one, other))
    assert first != second


def test_a_users_function_is_described_with_its_source(tmp_path, monkeypatch):
    """Another body of the same name is another function; that of madjax has its path alone."""
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    for module, body in (("theirs_a", "y"), ("theirs_b", "2 * y"), ("theirs_c", "y")):
        (tmp_path / f"{module}.py").write_text(f"def oracle(y, gram):\n    return {body}\n")
        said.append(config.describe(importlib.import_module(module).oracle)["source"])
    assert said[0] == said[2] != said[1]
    assert config.describe(madjax.extreme) == "madjax.mad.extreme"


PARTS = """
class Base:
    slope = 1
"""
NETWORK = """
import functools, math, jax, parts
from madjax.constraints import l1
MOST, KEPT, seen = 0.1, ("odd", 2), {}
def deep(v): return v + 1
@jax.jit
def helper(v): return (lambda u: deep(u))(v)
def unused(v): return v
def again(v): return again(v) if v else v
rule = functools.partial(helper, v=3)
class Block(parts.Base):
    @property
    def wide(self): return helper(KEPT)
class Net:
    def __call__(self, x): return Block().wide + math.pi
def constraint(y_tilde, y):
    seen["now"] = l1(y_tilde, y)
    return again(rule()) - MOST
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("network", "0.1", "0.3", {"constraint"}),
        ("network", '("odd", 2)', '("odd", 3)', {"Net"}),
        ("network", "v + 1", "v + 2", {"Net", "constraint"}),
        ("network", "v=3", "v=4", {"constraint"}),
        ("network", "if v else v", "if v else 0", {"constraint"}),
        ("network", "{}", "{1: 2}", set()),
        ("network", "def unused(v): return v", "", set()),
        ("network", "x): return", "x): return 1 +", {"Net"}),
        ("parts", "slope = 1", "slope = 2", {"Net"}),
    ],
)
def test_an_edit_of_what_a_users_function_names_is_an_edit_of_it(
    file, old, new, changed, tmp_path, monkeypatch
):
    """Of its own file and of others; what it does not name, or may change as it runs, is not."""
    monkeypatch.syspath_prepend(tmp_path)

    def digests(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        module = importlib.import_module("network")
        return {name: config.describe(getattr(module, name)) for name in ("Net", "constraint")}

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    texts = {"network": NETWORK, "parts": PARTS}
    before = digests(**texts)
    assert texts[file].count(old) == 1
    monkeypatch.setattr(math, "pi", 3.0)  # what is installed is not looked into
    assert digests(**texts) == before
    after = digests(**texts | {file: texts[file].replace(old, new)})
    assert {name for name in before if before[name] != after[name]} == changed


A, B, C, D, E, F = range(6)


def names_six():
    return F, A, D, E, C, B


def test_what_is_named_has_an_order():
    """Sets of text have another in each process."""
    assert named(names_six) == list("012345")
    assert named(json.JSONEncoder) == []  # it is installed, and names numbers


def test_what_is_installed_or_madjaxs_is_not_the_users():
    assert is_own(names_six)
    assert is_own(_Grown)
    assert not any(map(is_own, (madjax.extreme, madjax.MAD, optax.adam, json.dumps, print, 3, np)))


def test_what_cannot_be_described_is_named():
    with pytest.raises(InputError, match=r"is a object, .* use numbers, text, tuples"):
        config.describe({"a": object()})


@dataclass(frozen=True)
class _Grown:
    """A value that got fields after its first digests were written down."""

    old: int = 1
    place: str = field(default="here", metadata={"described": False})
    later: int | None = field(default=None, metadata={"described": "changed"})


def test_fields_that_came_later_change_no_digest_until_they_are_set():
    first, *others = (
        config.describe(_Grown(*each)) for each in ((1,), (1, "there"), (1, "", 0), (2,))
    )
    assert first.keys() == {"class", "old"}
    assert others[0] == first
    assert others[1] == first | {"later": 0}
    assert others[2] == first | {"old": 2}
    assert config.describe(datasets.MNIST_FAMILY).keys() == {"class", "name", "mean", "std"}
    assert config.describe(datasets.IMAGENET_FAMILY)["crop"] == 224
