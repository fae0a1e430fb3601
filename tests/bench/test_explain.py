"""nf.explain: what it tells is what happened; the page is whole."""

from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.bench import bandwidth, peak_flops, product_peak
from neuralforge.cli import main
from neuralforge.errors import NeuralForgeError


def step(w, x):
    loss, g = nf.value_and_grad(lambda w: F.gelu(F.dropout(x @ w, 0.5)).square().mean())(w)
    return w - 0.1 * g, loss


@pytest.fixture(scope="module")
def told():
    return nf.explain(nf.jit(step, donate=0), torch.randn(300, 40), torch.randn(200, 300)).measure(rounds=2)


def test_passes_and_what_they_changed(told):
    assert [stage.name for stage in told.passes][0] == "captured" and told.passes[-1].graph.equations
    fuse = next(stage for stage in told.passes if stage.name == "fuse")
    assert fuse.made and all(
        "elements" in rewrite.reason and "test_explain.py" in rewrite.source for rewrite in fuse.made
    )
    changes = told.changes("fuse").splitlines()
    assert any(line.startswith("-") and "aten.gelu_backward" in line for line in changes)
    assert any(line.startswith("+") and "fused_" in line for line in changes)
    assert told.changes("captured") == ""


def test_costs(told):
    product = next(row for row in told.rows if row.name == "aten.mm")
    moved = 4 * (200 * 300 + 300 * 40 + 200 * 40)
    assert (product.flops, product.bytes) == (2 * 200 * 300 * 40, moved)
    peak, stream = product_peak().value, bandwidth().value
    assert peak >= peak_flops("float32").value
    assert product.predicted == max(product.flops / peak, moved / stream)
    assert product.intensity == product.flops / moved and "product" in product.why
    fused = [row for row in told.rows if row.name.startswith("fused")]
    assert fused and all("operators over" in row.why and row.runs == "fused C" for row in fused)
    assert all(row.predicted > 0 for row in fused)


def test_attention_is_counted_by_its_scores():
    q = torch.randn(2, 3, 50, 16)
    for causal, scores in ((False, 50 * 50), (True, 50 * 51 // 2)):
        f = lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=causal)
        (row,) = [row for row in nf.explain(f, q).rows if "attention" in row.name]
        assert row.flops == 4 * 2 * 3 * scores * 16


def test_measured_times_are_of_the_program_itself(told):
    predicted, measured = told.seconds
    assert predicted == sum(row.predicted for row in told.rows)
    assert measured == sum(row.measured for row in told.rows) and all(row.measured >= 0 for row in told.rows)
    assert sum(row.measured > 0 for row in told.rows) > len(told.rows) / 2


def test_measuring_leaves_arguments_and_random_state_alone():
    w, x = torch.randn(30, 20), torch.randn(10, 30)
    jitted, before = nf.jit(step, donate=0), w.clone()
    torch.manual_seed(3)
    expected = jitted(w.clone(), x)
    torch.manual_seed(3)
    told = nf.explain(jitted, w, x)
    assert told.seconds[1] is None
    told.measure(rounds=1)
    assert torch.equal(w, before)
    found = jitted(w.clone(), x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_memory_in_use_stays_below_the_planned_peak(told):
    in_use = told.memory_in_use()
    assert len(in_use) == len(told.graph.equations)
    assert 0 < max(in_use) <= told.plan.peak_bytes


def test_max_rewrites(monkeypatch, timed):
    timed("own")
    x = torch.randn(64, 64)
    f = lambda x: (x.exp().sin() @ x).tanh().exp()
    made = lambda most: [
        r for stage in nf.explain(nf.jit(f, max_rewrites=most), x).passes for r in stage.made
    ]
    everything = made(None)
    assert [r.rule for r in everything] == ["fuse", "fuse", "epilogue", "prologue"]
    for most in range(5):
        assert made(most) == everything[:most]
        assert torch.allclose(nf.jit(f, max_rewrites=most)(x), f(x), rtol=1e-4)
        fused = [
            eq
            for eq in nf.explain(nf.jit(f, max_rewrites=most), x).graph.equations
            if hasattr(eq.op, "parts")
        ]
        assert len(fused) == [0, 1, 2, 1, 0][most]
    monkeypatch.setenv("NEURALFORGE_MAX_REWRITES", "1")
    assert made(None) == everything[:1]
    with pytest.raises(NeuralForgeError, match="max_rewrites=-1; expected how many"):
        made(-1)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects them."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page(told, tmp_path):
    page = Page(told.page(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == told.page()
    assert page.tags.count("svg") == 3 and page.links == [] and "script" not in page.tags
    words = " ".join(page.words)
    assert page.tags.count("rect") == 2 * min(24, len(told.rows)), (
        "a measured and a predicted bar for each equation"
    )
    assert page.tags.count("circle") == 1 + sum(row.flops > 0 and row.measured > 0 for row in told.rows)
    assert all(row.name in words and row.why in words for row in told.rows)
    assert all(stage.name in words for stage in told.passes) and "def program(" in words


def test_nothing_to_do_has_a_page_too():
    told = nf.explain(lambda x: x, torch.randn(3))
    assert told.rows == [] and "none" in str(told)
    Page(told.page())
    Page(told.measure(1).page())


def test_command(tmp_path, capsys):
    page = tmp_path / "step.html"
    small = [
        "--model.depth=1",
        "--model.d_model=32",
        "--model.n_heads=2",
        "--model.context=16",
        "--data.vocab_size=300",
        "--train.batch=2",
    ]
    assert main.main(["explain", *small, f"--page={page}", "--max-rewrites=5"]) == 0
    told = capsys.readouterr().out
    assert "ms measured" in told and "rewrites made: " in told and str(page) in told
    Page(page.read_text())
    assert main.main(["explain", "--max-rewrites=-1"]) == 2
    assert "--max-rewrites=-1; expected" in capsys.readouterr().err
    assert main.main(["explain", f"--page={tmp_path / 'no' / 'where.html'}"]) == 2
    assert "isn't there" in capsys.readouterr().err
    assert main.main(["explain", "--help"]) == 0 and "--page" in capsys.readouterr().out
