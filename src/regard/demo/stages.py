"""The three stages that the demo trains: what each is, and its config, which a person can go on with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One of the three models.

    Attributes:
        name: of its config and its run's folder.
        title: what people call it.
        papers: where it comes from.
        idea: what it does, in a sentence or two.
        model: the `[model]` section of its config, TOML.
        learning_rate: its highest.
    """

    name: str
    title: str
    papers: str
    idea: str
    model: str
    learning_rate: float


_RNN = """\
kind = "rnn"
cell = "gru"
layers = 1
width = 128
bidirectional = true
dropout = 0.0                # no pair is seen often enough to be learnt by heart
"""

STAGES = (
    Stage(
        name="rnn-fixed",
        title="RNN, fixed vector",
        papers="Sutskever et al. 2014, Cho et al. 2014",
        idea="One network reads all the letters into one vector; another says all the phones from that vector alone, "
             "however long the text was.",
        model=_RNN + """\
attention = "none"
context = "every_step"       # the decoder is given the same vector at each step (Cho et al. 2014)
""",
        learning_rate=3e-3,
    ),
    Stage(
        name="rnn-attention",
        title="RNN with attention",
        papers="Bahdanau et al. 2015, Luong et al. 2015",
        idea="The same RNN, but for each phone it looks back at every letter and weighs anew which of them matter now.",
        model=_RNN + """\
attention = "after"          # each step of the decoder looks back once its cell has run (Luong et al. 2015)
score = "general"            # query · W key
""",
        learning_rate=3e-3,
    ),
    Stage(
        name="transformer",
        title="Transformer",
        papers="Vaswani et al. 2017",
        idea="No recurrence is left: every letter and every phone looks at all the others at once, several ways in "
             "parallel.",
        model="""\
kind = "transformer"
layers = 2
width = 80
heads = 4
feedforward = 160
norm = "post"                # learns faster here than "pre"
dropout = 0.0                # no pair is seen often enough to be learnt by heart
""",
        learning_rate=4e-3,
    ),
)

_CONFIG = """\
# {title} ({papers}), letters to phones. Written by `regard demo`.
#
# To train it longer, into a folder of its own:
#   regard train {name}.toml --out longer --set train.steps={more_steps} --set train.minutes=60

[data]
root = "data"                # relative to this file
train = [{{ pairs = "train.tsv" }}]
valid = {{ pairs = "valid.tsv" }}
test = {{ pairs = "test.tsv" }}
prepared = "prepared"        # one for the three models: they learn from the same batches
bleu_tokenize = "none"       # phones are tokens already

[tokenizer.source]
kind = "char"                # letters
size = 40
[tokenizer.target]
kind = "space"               # phones, parted by spaces
size = 60

[model]
{model}
[train]
steps = {steps}                # what this machine was measured to do in the time
minutes = {minutes}              # the same for the three models
batch_tokens = 512
learning_rate = {learning_rate}
schedule = "cosine"
warmup = {warmup}
label_smoothing = 0.0
precision = "float32"        # faster than bfloat16 for models as small as these
validate_every = {validate_every}
log_every = {log_every}
metric = "loss"
seed = 1

[decode]
beam = 1                     # greedy; 5 is a little better and takes longer
length_penalty = 1.0
"""


def write_stage(stage: Stage, path: Path, steps: int, minutes: float) -> None:
    """Write a stage's config.

    Args:
        stage: which.
        path: the file; its data is in data/ beside it.
        steps: updates in all.
        minutes: of training, at most.
    """
    path.write_text(_CONFIG.format(
        name=stage.name,
        title=stage.title,
        papers=stage.papers,
        model=stage.model,
        learning_rate=stage.learning_rate,
        steps=steps,
        minutes=minutes,
        more_steps=10 * steps,
        warmup=max(1, steps // 10),
        validate_every=max(25, steps // 8),
        log_every=max(1, steps // 100),
    ), encoding="utf-8")
