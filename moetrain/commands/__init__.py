"""The commands of `moetrain`: what each takes, and the one function it calls.

A command imports that function when it runs, so `moetrain --help` loads neither torch nor datasets.
"""

from moetrain.commands import runs, models  # isort: skip (help lists what is imported first)
from moetrain.commands.base import Command, app, warn
from moetrain.commands.checkpoints import checkpoint_app
from moetrain.commands.data import data_app, tokenizer_app

app.command(checkpoint_app, name="checkpoint", help="Inspect, verify and convert checkpoints.")
app.command(data_app, name="data", help="Prepare the training text.")
app.command(tokenizer_app, name="tokenizer", help="Make a tokenizer.")

__all__ = ["Command", "app", "models", "runs", "warn"]
