"""The notebooks run top to bottom without an error or a warning. Their claims hold for the seed at
hand. They are committed as they were executed. The checks of their exercises know a solution from
a stub and from a likely mistake."""
import json
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import world
from conftest import ROOT
from exercises import checks, solutions
from exercises.solutions import kl_from_rewards, objective

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def read(path):
    return nbformat.read(path, as_version=4)


def cells_of(notebook, cell_type):
    return [cell for cell in notebook.cells if cell.cell_type == cell_type]


def outputs_of(notebook):
    outputs = []
    for cell in cells_of(notebook, "code"):
        outputs += cell.outputs
    return outputs


def printed(notebook, stream):
    """What was printed to "stdout" or to "stderr", a text."""
    return "".join(output.text for output in outputs_of(notebook)
                   if output.output_type == "stream" and output.name == stream)


# ---- The notebooks

@each_notebook
def test_a_notebook_runs_and_its_claims_hold(path, request, monkeypatch):
    """Top to bottom in a fresh kernel, in its own folder, for the seed of --seed. A claim that does
    not hold raises an error in its cell. Nothing may be left on the error stream: a reader would
    see a warning."""
    monkeypatch.setenv("COURSE_SEED", str(request.config.getoption("--seed")))
    notebook = read(path)
    in_its_folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=in_its_folder).execute()
    assert not printed(notebook, "stderr")
    held = [line for line in printed(notebook, "stdout").splitlines() if line.startswith("holds: ")]
    assert len(held) >= 8, "at least eight claims in a notebook"


@each_notebook
def test_a_notebook_is_committed_as_it_was_executed(path):
    """In order, with outputs, without errors or warnings, under 1 MB. It begins with what one
    learns and ends with what is next."""
    notebook = read(path)
    counts = [cell.execution_count for cell in cells_of(notebook, "code")]
    in_order = list(range(1, len(counts) + 1))
    assert counts == in_order, "run it again, top to bottom: see the README"
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert not printed(notebook, "stderr")
    assert path.stat().st_size < 1_000_000
    text = "\n".join(cell.source for cell in cells_of(notebook, "markdown"))
    for part in ("What you will be able to do", "What you should know", "How long it takes",
                 "**Predict", "**Next:**"):
        assert part in text, f"{path.name} lacks {part!r}"
    exercises = re.findall(r"^### Exercise \d\.\d", text, re.MULTILINE)
    assert len(exercises) >= 3, "at least three exercises in a notebook"
    assert "/work/" not in json.dumps(notebook), "a path of somebody's machine is in an output"


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in cells_of(read(path), "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            there = target.startswith("http") or (path.parent / target).exists()
            assert there, f"{path.name} links to {target}"


# ---- Exercises: a solution, and what is often written instead. The key is a piece of what the
# check should say to it.

def forwards(rewards, values, lam):
    """4.2 begun at the wrong end: an advantage that adds up what came before."""
    next_values = torch.cat([values[1:], torch.zeros(1).double()])
    out = (rewards + next_values - values).tolist()
    for t in range(1, len(out)):
        out[t] += lam * out[t - 1]
    return torch.tensor(out, dtype=torch.float64)


def expected_reward(p, r):
    return sum(a * c for a, c in zip(p, r))


def clip_ratio(ratio, clip):
    return ratio.clamp(1 - clip, 1 + clip)


def score_in_place(score, logps, ref_logps, beta):
    """4.1 without the log-ratio of the last token."""
    penalty = beta * (logps - ref_logps)
    return torch.cat([-penalty[:-1], torch.tensor([score]).double()])


EXERCISES = {
    "1_1": (objective, {
        "the KL is missing": lambda p, q, r, beta: expected_reward(p, r),
        "Eq. 3 subtracts":
            lambda p, q, r, beta: 2 * expected_reward(p, r) - objective(p, q, r, beta),
        "beta is missing": lambda p, q, r, beta: objective(p, q, r, 1.0),
        "the expectation is under the policy":
            lambda p, q, r, beta: expected_reward(p, r) + objective(q, p, [0] * 3, beta)}),
    "1_2": (solutions.optimal_policy, {
        "does not sum to 1": lambda ref, r, beta: ref + r / beta,
        "the wrong way round": lambda ref, r, beta: torch.log_softmax(ref + r * beta, -1),
        "These are probabilities": lambda ref, r, beta: torch.softmax(ref + r / beta, -1),
        "The reference is missing": lambda ref, r, beta: torch.log_softmax(r / beta, -1)}),
    "1_3": (solutions.reward_difference, {
        "beta is missing": lambda pi, ref, beta, i, j: (pi - ref)[i] - (pi - ref)[j],
        "The sign is flipped":
            lambda pi, ref, beta, i, j: beta * ((pi - ref)[j] - (pi - ref)[i]),
        "how likely, not how good": lambda pi, ref, beta, i, j: beta * (pi[i] - pi[j])}),
    "1_4": (solutions.beta_for_half_a_nat(), {"a smaller beta": 50.0, "a larger beta": 0.01}),
    "3_1": (solutions.accuracy, {
        "A tie counts as wrong": lambda w, l: (w > l).float().mean(),
        "A tie counts as right": lambda w, l: (w >= l).float().mean(),
        "Divide by the number":
            lambda w, l: (w > l).sum() + 0.5 * (w == l).sum() if w.any() else 0.5,
        "(chosen_rewards > rejected_rewards).float().mean()": lambda w, l: (w > l).mean(),
        "the chosen reward should be the larger": lambda w, l: solutions.accuracy(l, w)}),
    "3_2": (kl_from_rewards, {
        "a KL is never negative": lambda w, l, beta: -kl_from_rewards(w, l, beta),
        "beta is still in it": lambda w, l, beta: kl_from_rewards(w, l, 1.0),
        "contain beta already, so divide by beta":
            lambda w, l, beta: -(w.mean() + l.mean()) / 2 * beta,
        "take the mean of both": lambda w, l, beta: 2 * kl_from_rewards(w, l, beta)}),
    "3_3": (solutions.missing_mass, {
        "upside down": lambda p, q: solutions.missing_mass(q, p),
        "the exp of a mean": lambda p, q: 1 - (p - q).mean().exp(),
        "what is missing": lambda p, q: (p - q).exp().mean()}),
    "4_1": (solutions.token_rewards, {
        "It is a penalty": lambda s, p, q, beta: solutions.token_rewards(s, q, p, beta),
        "beta is missing": lambda s, p, q, beta: solutions.token_rewards(s, p, q, 1.0),
        "at every token": lambda s, p, q, beta: s - beta * (p - q),
        "at the first token":
            lambda s, p, q, beta: solutions.token_rewards(s, p.flip(0), q.flip(0), beta).flip(0),
        "not put in its place": score_in_place}),
    "4_2": (solutions.gae, {
        "the TD errors alone": lambda r, v, lam: solutions.gae(r, v, 0.0),
        "lam is missing": lambda r, v, lam: solutions.gae(r, v, 1.0),
        "The values are missing": lambda r, v, lam: solutions.gae(r, 0 * v, lam),
        "the reward to go": lambda r, v, lam: solutions.gae(r, 0 * v, 1.0),
        "its V' is 0":
            lambda r, v, lam: solutions.gae(r + torch.tensor([0, 0, 1]) * v, v, lam),
        "It runs forwards": forwards}),
    "4_3": (solutions.clipped_gain, {
        "Nothing is clipped": lambda ratio, a, clip: ratio * a,
        "clipped on both sides": lambda ratio, a, clip: clip_ratio(ratio, clip) * a,
        "the pessimistic one":
            lambda ratio, a, clip: torch.maximum(ratio * a, clip_ratio(ratio, clip) * a),
        "That is the loss": lambda ratio, a, clip: -solutions.clipped_gain(ratio, a, clip)}),
    "4_4": (solutions.baseline, {
        "E[r] alone": lambda p, q, r, beta: (p.exp() * r).sum(),
        "It is a penalty": lambda p, q, r, beta: (p.exp() * (r + beta * (p - q))).sum(),
        "beta is missing": lambda p, q, r, beta: solutions.baseline(p, q, r, 1.0),
        "come from the policy": lambda p, q, r, beta: (q.exp() * (r - beta * (p - q))).sum(),
        "beta log Z": lambda p, q, r, beta: beta * torch.logsumexp(q + r / beta, -1)}),
    "6_1": (solutions.soft_value, {
        "That is the mean of Q": lambda q, x, beta: (q.exp() * x).sum(),
        "the largest Q": lambda q, x, beta: x.max(),
        "The reference is missing": lambda q, x, beta: beta * torch.logsumexp(x / beta, -1),
        "in front of the logarithm": lambda q, x, beta: torch.logsumexp(q + x / beta, -1),
        "Q is divided by it, and": lambda q, x, beta: solutions.soft_value(q, x, 1.0),
        "the wrong way round": lambda q, x, beta: solutions.soft_value(q, x, 1 / beta),
        "the policy of the state":
            lambda q, x, beta: torch.log_softmax(q + x / beta, -1)}),
    "6_2": (solutions.rewards_from_tokens, {
        "The padding counts": lambda p, q, mask, beta: beta * (p - q).sum(-1),
        "It is a mean. The rewards": lambda p, q, mask, beta:
            solutions.rewards_from_tokens(p, q, mask, beta) / mask.sum(-1),
        "over the padded length": lambda p, q, mask, beta: (beta * (p - q) * mask).mean(-1),
        "beta is missing":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(p, q, mask, 1.0),
        "The sign is flipped":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(q, p, mask, beta),
        "how likely, not how good":
            lambda p, q, mask, beta: solutions.rewards_from_tokens(p, 0 * q, mask, beta),
        "add up over its tokens": lambda p, q, mask, beta: beta * (p - q) * mask,
        "the sum over all responses": lambda p, q, mask, beta: (beta * (p - q) * mask).sum()}),
    "6_3": (solutions.values_from_tokens, {
        "V(s_0) is missing":
            lambda p, q, beta, v0: solutions.values_from_tokens(p, q, beta, 0.0),
        "Only the last token": lambda p, q, beta, v0: v0 + beta * (p - q),
        "It runs backwards":
            lambda p, q, beta, v0: v0 + (beta * (p - q)).flip(0).cumsum(0).flip(0),
        "beta is missing": lambda p, q, beta, v0: solutions.values_from_tokens(p, q, 1.0, v0),
        "The sign is flipped":
            lambda p, q, beta, v0: solutions.values_from_tokens(q, p, beta, v0),
        "of the whole response alone": lambda p, q, beta, v0: v0 + beta * (p - q).sum(),
        "before the first token": lambda p, q, beta, v0:
            torch.cat([torch.tensor([v0]).double(), v0 + (beta * (p - q)).cumsum(0)])}),
    "6_4": (solutions.culprit, {
        "There the value is lowest": lambda values: values.argmin(),
        "After this token": lambda values: values.argmin() - 1,
        "off by one": lambda values: values.diff().argmin() + 1,
        "the value rises most": lambda values: values.diff().argmax(),
        "how much is lost": lambda values: values.diff().min()}),
    "8_1": (solutions.PATIENTS["A"], {
        "the right file": "data.pad", "so is all of its file": "train.train_dpo",
        "write the name of a function": "collate"}),
    "8_2": (solutions.PATIENTS["B"], {
        "the right file": "data.collate", "so is all of its file": "model.GPT.generate"}),
    "8_3": (solutions.PATIENTS["C"], {
        "the right file": "model.GPT.generate", "so is all of its file": "trie.Trie.logps"}),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercises_check_knows_right_from_wrong(name, capsys):
    check, (solution, mistakes) = getattr(checks, f"exercise_{name}"), EXERCISES[name]
    assert check(solution)
    assert "right." in capsys.readouterr().out
    stub = (lambda *args: ...) if callable(solution) else None
    for empty in (..., stub):
        assert not check(empty)
        assert "not started" in capsys.readouterr().out
    for message, wrong in mistakes.items():
        assert not check(wrong)
        said = capsys.readouterr().out
        assert "not yet" in said and message in said, said
    # an error in the answer itself is reported
    assert not check(lambda *args: 1 / 0 if args else 0)
    assert "not yet" in capsys.readouterr().out


def test_the_last_patients(capsys):
    """Exercise 8.4 asks for three functions at once. Those of solutions.PATIENTS are right."""
    assert not checks.exercise_8_4(..., ..., ...)
    assert "not started" in capsys.readouterr().out
    d, e, f = [solutions.PATIENTS[patient] for patient in "DEF"]
    assert not checks.exercise_8_4(d, e, "world.win_rate")
    assert "Patient F: this is the right file" in capsys.readouterr().out
    assert checks.exercise_8_4(d, e, f)


def test_every_exercise_of_the_notebooks_is_here():
    asked = set()
    for path in NOTEBOOKS:
        for cell in cells_of(read(path), "code"):
            asked.update(re.findall(r"checks\.exercise_(\d_\d)", cell.source))
    assert asked == set(EXERCISES) | {"8_4"}


def test_the_solution_of_exercise_4_by_another_way():
    """The bisection's beta against world.beta_at_kl's, to 1e-6."""
    ref, reward = checks.small_world(2)
    want = world.beta_at_kl(ref[None], reward[None], 0.5)
    assert solutions.beta_for_half_a_nat() == pytest.approx(want, rel=1e-6)
