"""support/checkpoints.py and files.py: what is written is read back or refused, whatever happened
to the file in between."""
import hashlib
import math
import os
import random

import pytest
import torch

from data import DataError
from model import GPT, GPTConfig
from support import checkpoints
from support.checkpoints import fingerprint, load_model, save_model
from support.files import append_jsonl, atomic, read_json, read_jsonl, sha256, write_json

CONFIG = GPTConfig(block_size=24, vocab_size=40, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


def test_round_trip(model, tmp_path):
    """The same logits, the same facts, a tied head, and no other file. The version of torch that
    wrote it is a fact, too."""
    save_model(model, tmp_path / "m.pt", flags={"beta": 0.5, "data": None})
    again, facts = load_model(tmp_path / "m.pt")
    tokens = torch.randint(40, (2, 9))
    assert torch.equal(again.eval()(tokens), model(tokens))
    assert facts == {"flags": {"beta": 0.5, "data": None}, "torch": str(torch.__version__)}
    assert again.head.weight is again.wte.weight
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt"], "something half-written was left"


def test_others_can_read_it_with_torch_alone(model, tmp_path):
    """The checksum is a comment of the zip archive that torch.save writes. It disturbs nobody."""
    save_model(model, tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    assert saved["config"]["n_embd"] == 16
    assert torch.equal(saved["weights"]["wte.weight"], model.wte.weight)


def test_no_damage_goes_unseen(model, tmp_path):
    """The file cut at every 4 KiB and by one byte; one bit flipped at 500 places, of all parts of
    the file; a byte more; two blocks exchanged. Each is refused, and never read as if it were
    good. A flip of a bit inside a tensor gives another weight, and torch.load alone does not see
    it."""
    file, damaged = tmp_path / "m.pt", tmp_path / "damaged.pt"
    save_model(model, file)
    good = file.read_bytes()
    cut = [good[:size] for size in (*range(0, len(good), 4096), len(good) - 1)]
    other = [good + b"0", good[:4096] + good[8192:12288] + good[4096:8192] + good[12288:]]
    flipped, choose = [], random.Random(0)
    places = [choose.randrange(len(good)) for _ in range(380)]
    places += range(len(good) - 100, len(good))  # the end of the archive, and the checksum itself
    for place in [*places, *range(20)]:
        changed = bytearray(good)
        changed[place] ^= 1 << choose.randrange(8)
        flipped.append(bytes(changed))
    assert len(flipped) == 500 and len(cut) > 10
    for content in [*cut, *other, *flipped]:
        damaged.write_bytes(content)
        with pytest.raises(DataError, match="damaged.pt is not a checkpoint that can be read: "):
            load_model(damaged)
    damaged.write_bytes(good)
    assert fingerprint(load_model(damaged)[0]) == fingerprint(model)


class Code:
    """Where it is unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_what_is_no_checkpoint_is_refused_with_its_reason(model, tmp_path):
    """A text; what torch.save alone wrote, as older versions did; a sealed file that would run
    code, which is not run; and a sealed file that holds no model."""
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    torch.save(model.state_dict(), tmp_path / "older.pt")
    checkpoints.save({"weights": Code(str(tmp_path / "made"))}, tmp_path / "code.pt")
    checkpoints.save({"weights": {}}, tmp_path / "other.pt")
    for name, reason in (("text", "cut short, or it is another kind"), ("older", "older version"),
                         ("code", "[Ww]eights.only"), ("other", "holds no model")):
        with pytest.raises(DataError, match=f"{name}.pt .*{reason}"):
            load_model(tmp_path / f"{name}.pt")
    assert not (tmp_path / "made").exists(), "a checkpoint has run code"
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "absent.pt")


def test_a_fingerprint_tells_weights_apart(model):
    """The same weights have the same fingerprint in any mode. A change of the last bit of one
    weight shows in it, and so does the order of the weights of a tensor: the order of a sum does
    not matter, that of a hash does."""
    before = fingerprint(model)
    assert fingerprint(model.train()) == before
    for p in model.parameters():
        kept = p.detach().clone()
        changed = kept.clone()
        changed.view(-1)[0] = torch.nextafter(kept.view(-1)[0], torch.tensor(math.inf))
        for other in (changed, kept.flip(0)):
            p.data = other
            assert torch.equal(other, kept) or fingerprint(model) != before, "a change unseen"
        p.data = kept
    assert fingerprint(model) == before


# ---- Writing

def test_an_interrupted_save_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    """Half of the new file is written: by an interrupt, by a full disk as Python reports it, and
    as torch does. The last two are OSErrors, so that a command can say what happened."""
    save_model(model, tmp_path / "m.pt", version=1)
    for error, becomes in ((KeyboardInterrupt(), KeyboardInterrupt),
                           (OSError(28, "No space left on device"), OSError),
                           (RuntimeError("unexpected pos 576 vs 534"), OSError)):
        def die(obj, path):
            path.write_bytes(b"half")
            raise error
        with monkeypatch.context() as patch, pytest.raises(becomes):
            patch.setattr(torch, "save", die)
            save_model(model, tmp_path / "m.pt", version=2)
        assert load_model(tmp_path / "m.pt")[1]["version"] == 1
        assert [f.name for f in tmp_path.iterdir()] == ["m.pt"], "something half-written was left"


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    """Whoever reads while it is written, or after an error, finds the old content whole. A folder
    that is not there is made."""
    folder = tmp_path / "new" / "folder"
    file = folder / "a.json"
    write_json({"version": 1}, file)
    with pytest.raises(KeyboardInterrupt):
        with atomic(file) as beside:
            beside.write_text('{"version"', encoding="utf-8")
            assert read_json(file) == {"version": 1}
            raise KeyboardInterrupt
    assert read_json(file) == {"version": 1}
    with pytest.raises(TypeError):
        write_json({"version": torch.zeros(1)}, file)
    assert read_json(file) == {"version": 1}
    with pytest.raises(KeyboardInterrupt):
        with atomic(folder / "new.json"):
            raise KeyboardInterrupt
    write_json({"version": 2}, file)
    assert read_json(file) == {"version": 2}
    assert [f.name for f in folder.iterdir()] == ["a.json"], "something half-written was left"


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    """A program that is killed, or a full disk, may leave the beginning of a last line."""
    file = tmp_path / "m.jsonl"
    for step in range(3):
        append_jsonl({"step": step}, file)
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        assert read_jsonl(file) == [{"step": i} for i in range(whole[:size].count(b"\n"))]
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_hash_of_a_file_a_part_of_it_and_a_folder(tmp_path):
    """Of a file, hashlib's own. A folder's changes with a name or a byte of any file in it, and
    with nothing else."""
    content = bytes(range(256)) * 9000  # more than is read at once
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(content)
    assert sha256(tmp_path / "f" / "a") == hashlib.sha256(content).hexdigest()
    assert sha256(tmp_path / "f" / "a", without=71) == hashlib.sha256(content[:-71]).hexdigest()
    (tmp_path / "f" / "g").mkdir()
    (tmp_path / "f" / "g" / "b").write_bytes(b"x")
    before = sha256(tmp_path / "f")
    (tmp_path / "f").rename(tmp_path / "h")
    assert sha256(tmp_path / "h") == before
    (tmp_path / "h" / "g" / "b").write_bytes(b"y")
    changed = sha256(tmp_path / "h")
    (tmp_path / "h" / "g" / "b").rename(tmp_path / "h" / "g" / "c")
    assert len({before, changed, sha256(tmp_path / "h")}) == 3
