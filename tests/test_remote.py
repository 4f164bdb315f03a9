"""A victim behind HTTP: asked once for each query, and never again for what was paid."""

import json
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import MLP, AdaptiveKnockoff, Classifier, InputError, Knockoff, Recipe, jbda, steal
from madjax.attacks import RemoteVictim
from madjax.datasets import MNIST_FAMILY

SHAPE, CLASSES = (5, 4, 1), 3
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, *SHAPE), dtype=np.uint8)
LABELS = np.arange(50) % CLASSES
WEIGHTS = RNG.normal(size=(20, CLASSES)).astype(np.float32)
NETWORK = Classifier(MLP(CLASSES, (4,)), MNIST_FAMILY.preprocess, SHAPE)
RECIPE = Recipe(epochs=1, batch_size=16)
KNOCKOFF = Knockoff(budget=30, recipe=RECIPE)


def posteriors(images):
    """The victim, in NumPy."""
    logits = images.reshape(len(images), -1).astype(np.float32) / 255 @ WEIGHTS
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


class Server(ThreadingHTTPServer):
    """It counts the images that it is sent, and breaks down after so many."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sizes, self.most = [], np.inf
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        raise


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        images = np.array(json.loads(body), np.float32).reshape(-1, *SHAPE)
        with self.server.lock:
            down = sum(self.server.sizes) + len(images) > self.server.most
            if not down:
                self.server.sizes.append(len(images))
        self.send_response(503 if down else 200)
        self.end_headers()
        if not down:
            self.wfile.write(json.dumps(posteriors(images).tolist()).encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask_over(server):
    def ask(images):
        url = f"http://127.0.0.1:{server.server_port}"
        request = urllib.request.Request(url, json.dumps(images.tolist()).encode())
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise

    return ask


def attack_with(attack, respond, seed=0):
    test = IMAGES[:10], LABELS[:10]
    return steal(attack, seed, respond, IMAGES, LABELS, NETWORK, MNIST_FAMILY, test)


SUBSTITUTE = {"budget": 30, "recipe": RECIPE}
ATTACKS = {
    "knockoff": KNOCKOFF,
    "nquery": replace(KNOCKOFF, repeats=3),
    "jbda": jbda(seeds=8, substitute=RECIPE, **SUBSTITUTE),
    "adaptive": AdaptiveKnockoff(online=Recipe(epochs=1, batch_size=8), **SUBSTITUTE),
}


@pytest.mark.parametrize(
    "name", [*list(ATTACKS)[:-1], pytest.param("adaptive", marks=pytest.mark.slow)]
)
def test_an_attack_over_http_is_the_attack_in_jax_and_asks_its_budget(name, server, tmp_path):
    victim = RemoteVictim(ask_over(server), num_classes=CLASSES, directory=tmp_path, batch=7)
    transfer, state = attack_with(ATTACKS[name], victim)
    assert victim.asked == sum(server.sizes) == 30
    assert max(server.sizes) <= 7

    def in_jax(numbers, x):
        return jax.nn.softmax(x.reshape(len(x), -1).astype(jnp.float32) / 255 @ WEIGHTS)

    want, same = attack_with(ATTACKS[name], in_jax)
    np.testing.assert_allclose(transfer.targets, want.targets, atol=1e-5)
    np.testing.assert_allclose(state.loss, same.loss, rtol=1e-3)
    again = RemoteVictim(ask_over(server), num_classes=CLASSES, directory=tmp_path)
    repeated, _ = attack_with(ATTACKS[name], again)
    np.testing.assert_array_equal(repeated.targets, transfer.targets)
    assert (again.asked, again.kept, sum(server.sizes)) == (0, 30, 30)


def test_a_breakdown_loses_nothing_that_was_paid(server, tmp_path):
    server.most = 20
    victim = RemoteVictim(ask_over(server), num_classes=CLASSES, directory=tmp_path, batch=8)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        attack_with(KNOCKOFF, victim)
    assert victim.asked == 16
    server.most = np.inf
    again = RemoteVictim(ask_over(server), num_classes=CLASSES, directory=tmp_path, batch=8)
    transfer, _ = attack_with(KNOCKOFF, again)
    assert (again.kept, again.asked, sum(server.sizes)) == (16, 14, 30)
    np.testing.assert_allclose(transfer.targets, posteriors(IMAGES[transfer.x]), atol=1e-6)


@pytest.mark.parametrize("cut", [1, 30, 45])
def test_a_half_written_answer_is_asked_for_again(cut, tmp_path):
    def victim():
        return RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path)

    attack_with(KNOCKOFF, victim())
    path = tmp_path / "answers.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    again = victim()
    transfer, _ = attack_with(KNOCKOFF, again)
    assert (again.kept, again.asked) == (29, 1)
    assert path.stat().st_size == size
    np.testing.assert_allclose(transfer.targets, posteriors(IMAGES[transfer.x]), atol=1e-6)


def test_another_seed_asks_for_its_own_images(tmp_path):
    for seed, paid in ((0, 30), (1, 30), (0, 0)):
        victim = RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path)
        attack_with(KNOCKOFF, victim, seed)
        # An image that two seeds send under one number was paid for once.
        assert paid - 3 <= victim.asked <= paid
        assert victim.asked + victim.kept == 30


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda x: posteriors(x).argmax(-1), r"answers 16 queries with an array of shape \(16,\)"),
        (lambda x: posteriors(x)[:-1], r"with an array of shape \(15, 3\): ask is to return"),
        (
            lambda x: np.log(posteriors(x)),
            "16 of .* 16 answers are no posteriors: entries run from .* ask is to return prob",
        ),
        (lambda x: posteriors(x) * np.nan, "NaN or infinity in 16 of 16; ask"),
    ],
)
def test_answers_that_are_no_posteriors_are_named_and_not_kept(ask, words, tmp_path):
    victim = RemoteVictim(ask, num_classes=CLASSES, directory=tmp_path, batch=16)
    with pytest.raises(InputError, match=words) as caught:
        attack_with(KNOCKOFF, victim)
    assert "\n" not in str(caught.value)
    assert victim.asked == 0
    sound = RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path)
    attack_with(KNOCKOFF, sound)
    assert sound.asked == 30


def test_posteriors_beside_answers_that_are_none_are_kept(tmp_path):
    """One of 16 answers is rounded so far that it does not sum to 1: the others were paid for."""

    def truncated(images):
        said = np.array(posteriors(images))
        said[len(said) // 2] *= 0.9
        return said

    victim = RemoteVictim(truncated, num_classes=CLASSES, directory=tmp_path, batch=16)
    with pytest.raises(InputError, match=r"1 of .* 16 answers are no posteriors: .* 0\.9"):
        attack_with(KNOCKOFF, victim)
    assert victim.asked == 15
    sound = RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path)
    attack_with(KNOCKOFF, sound)
    assert (sound.asked, sound.kept) == (15, 15)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(InputError, match="batch is 0"):
        RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path, batch=0)
    attack_with(KNOCKOFF, RemoteVictim(posteriors, num_classes=CLASSES, directory=tmp_path))
    for classes in (4, 30):
        with pytest.raises(InputError, match=f"does not hold answers of {classes} classes"):
            RemoteVictim(posteriors, num_classes=classes, directory=tmp_path)
    wrong = RemoteVictim(posteriors, num_classes=4, directory=tmp_path / "other")
    with pytest.raises(InputError, match="the stolen model has 3 classes"):
        attack_with(KNOCKOFF, wrong)
