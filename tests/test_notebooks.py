"""notebooks/: each runs top to bottom without an error or a warning, its claims hold for the seed at hand, it is committed executed,
and its exercises' checks know a solution from a stub and from a likely mistake."""
import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import world
from conftest import ROOT
from exercises import checks, solutions

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem[:2])
def test_a_notebook_runs_and_its_claims_hold(path, request, monkeypatch):
    """Top to bottom in a fresh kernel, in its own folder, for the seed of --seed. A claim that does not hold raises in its cell.
    Nothing may be left on the error stream: a reader would see a warning."""
    monkeypatch.setenv("COURSE_SEED", str(request.config.getoption("--seed")))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    held = [line for o in outputs if o.output_type == "stream" for line in o.text.splitlines() if line.startswith("holds: ")]
    assert len(held) >= 8, "at least eight claims a notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem[:2])
def test_a_notebook_is_committed_as_it_was_executed(path):
    """In order, with outputs, without errors or warnings, under 1 MB; it begins with what one learns and ends with what is next."""
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run it again, top to bottom: see the README"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    for part in ("What you will be able to do", "What you should know", "How long it takes", "**Predict", "**Next:**"):
        assert part in text, f"{path.name} lacks {part!r}"
    assert len(re.findall(r"^### Exercise \d\.\d", text, re.M)) >= 3, "at least three exercises a notebook"
    assert "/work/" not in json.dumps(nbformat.read(path, as_version=4)), "a path of somebody's machine is in an output"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem[:2])
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name} links to {target}"


# ---- Exercises: a solution, a stub, and what is often written instead (with a piece of what should be said)

def forwards(rewards, values, lam):
    """4.2 begun at the wrong end: an advantage that adds up what was before."""
    out = (rewards + torch.cat([values[1:], torch.zeros(1).double()]) - values).tolist()
    for t in range(1, len(out)):
        out[t] += lam * out[t - 1]
    return torch.tensor(out, dtype=torch.float64)


EXERCISES = {
    "1_1": (solutions.objective, {
        "the KL is missing": lambda p, q, r, beta: sum(a * c for a, c in zip(p, r)),
        "Eq. 3 subtracts": lambda p, q, r, beta: 2 * sum(a * c for a, c in zip(p, r)) - solutions.objective(p, q, r, beta),
        "beta is missing": lambda p, q, r, beta: solutions.objective(p, q, r, 1.0),
        "the expectation is under the policy": lambda p, q, r, beta: sum(a * c for a, c in zip(p, r))
        + solutions.objective(q, p, [0] * 3, beta)}),
    "1_2": (solutions.optimal_policy, {
        "does not sum to 1": lambda ref, r, beta: ref + r / beta,
        "the wrong way round": lambda ref, r, beta: torch.log_softmax(ref + r * beta, -1),
        "These are probabilities": lambda ref, r, beta: torch.softmax(ref + r / beta, -1),
        "The reference is missing": lambda ref, r, beta: torch.log_softmax(r / beta, -1)}),
    "1_3": (solutions.reward_difference, {
        "beta is missing": lambda pi, ref, beta, i, j: (pi - ref)[i] - (pi - ref)[j],
        "The sign is flipped": lambda pi, ref, beta, i, j: beta * ((pi - ref)[j] - (pi - ref)[i]),
        "how likely, not how good": lambda pi, ref, beta, i, j: beta * (pi[i] - pi[j])}),
    "3_1": (solutions.accuracy, {
        "Ties count as wrong": lambda w, l: (w > l).float().mean(),
        "Ties count as right": lambda w, l: (w >= l).float().mean(),
        "wanted the share": lambda w, l: (w > l).sum() + 0.5 * (w == l).sum() if w.any() else 0.5,
        "the chosen reward should be the larger": lambda w, l: solutions.accuracy(l, w)}),
    "3_2": (solutions.kl_from_rewards, {
        "a KL is never negative": lambda w, l, beta: -solutions.kl_from_rewards(w, l, beta),
        "beta is still in it": lambda w, l, beta: solutions.kl_from_rewards(w, l, 1.0),
        "take the mean of both": lambda w, l, beta: 2 * solutions.kl_from_rewards(w, l, beta)}),
    "3_3": (solutions.missing_mass, {
        "upside down": lambda p, q: solutions.missing_mass(q, p),
        "exp of a mean": lambda p, q: 1 - (p - q).mean().exp(),
        "what is missing": lambda p, q: (p - q).exp().mean()}),
    "4_1": (solutions.token_rewards, {
        "it is a penalty": lambda s, p, q, beta: solutions.token_rewards(s, q, p, beta),
        "beta is missing": lambda s, p, q, beta: solutions.token_rewards(s, p, q, 1.0),
        "at every token": lambda s, p, q, beta: s - beta * (p - q),
        "at the first token": lambda s, p, q, beta: solutions.token_rewards(s, p.flip(0), q.flip(0), beta).flip(0),
        "not put in its place": lambda s, p, q, beta: torch.cat([-beta * (p - q)[:-1], torch.tensor([s]).double()])}),
    "4_2": (solutions.gae, {
        "the TD errors alone": lambda r, v, lam: solutions.gae(r, v, 0.0),
        "lam is missing": lambda r, v, lam: solutions.gae(r, v, 1.0),
        "The values are missing": lambda r, v, lam: solutions.gae(r, 0 * v, lam),
        "the reward to go": lambda r, v, lam: solutions.gae(r, 0 * v, 1.0),
        "its V' is 0": lambda r, v, lam: solutions.gae(r + torch.tensor([0, 0, 1]) * v, v, lam),
        "It runs forwards": lambda r, v, lam: forwards(r, v, lam)}),
    "4_3": (solutions.clipped_gain, {
        "Nothing is clipped": lambda ratio, a, clip: ratio * a,
        "Clipped on both sides": lambda ratio, a, clip: ratio.clamp(1 - clip, 1 + clip) * a,
        "the pessimistic one": lambda ratio, a, clip: torch.maximum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a),
        "That is the loss": lambda ratio, a, clip: -solutions.clipped_gain(ratio, a, clip)}),
    "4_4": (solutions.baseline, {
        "E[r] alone": lambda p, q, r, beta: (p.exp() * r).sum(),
        "it is a penalty": lambda p, q, r, beta: (p.exp() * (r + beta * (p - q))).sum(),
        "beta is missing": lambda p, q, r, beta: solutions.baseline(p, q, r, 1.0),
        "samples come from the policy": lambda p, q, r, beta: (q.exp() * (r - beta * (p - q))).sum(),
        "beta log Z": lambda p, q, r, beta: beta * torch.logsumexp(q + r / beta, -1)}),
    "8_1": ("data.collate", {"the right file": "data.pad", "so is all of its file": "train.fit", "name a function": "collate"}),
    "8_2": ("data.pad", {"the right file": "data.collate", "so is all of its file": "model.GPT.generate"}),
    "8_3": ("model.GPT.hidden", {"the right file": "model.GPT.generate", "so is all of its file": "world.Trie.logps"}),
    "1_4": (solutions.beta_for_half_a_nat(), {"a smaller beta": 50.0, "a larger beta": 0.01}),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercises_check_knows_right_from_wrong(name, capsys):
    check, (solution, mistakes) = getattr(checks, f"exercise_{name}"), EXERCISES[name]
    assert check(solution) and "right." in capsys.readouterr().out
    for empty in (..., (lambda *args: ...) if callable(solution) else None):
        assert not check(empty) and "not started" in capsys.readouterr().out
    for message, wrong in mistakes.items():
        assert not check(wrong)
        printed = capsys.readouterr().out
        assert "not yet" in printed and message in printed, printed
    assert not check(lambda *args: 1 / 0 if args else 0) and "not yet" in capsys.readouterr().out, "an error in the answer is reported"


def test_the_last_patients(capsys):
    """Exercise 8.4 asks for three functions at once; the solutions are those of solutions.PATIENTS, and all of 08's."""
    assert not checks.exercise_8_4(..., ..., ...) and "not started" in capsys.readouterr().out
    assert not checks.exercise_8_4("dpo.dpo_loss", "model.sample", "world.win_rate")
    assert "Patient F: the right file" in capsys.readouterr().out
    assert checks.exercise_8_4(*(solutions.PATIENTS[p] for p in "DEF"))
    assert all(getattr(checks, f"exercise_8_{i}")(solutions.PATIENTS[p]) for i, p in ((1, "A"), (2, "B"), (3, "C")))


def test_every_exercise_of_the_notebooks_is_here():
    asked = {name for path in NOTEBOOKS for c in code_cells(path) for name in re.findall(r"checks\.exercise_(\d_\d)", c.source)}
    assert asked == set(EXERCISES) | {"8_4"}


def test_the_solution_of_exercise_4_by_another_way():
    """The bisection's beta against world.beta_at_kl's, 1e-6."""
    ref, reward = checks.small_world(2)
    assert solutions.beta_for_half_a_nat() == pytest.approx(world.beta_at_kl(ref[None], reward[None], 0.5), rel=1e-6)
