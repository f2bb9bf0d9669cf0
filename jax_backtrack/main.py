"""Trains, samples and evaluates models that backtrack: `jax-backtrack --config=sft_smollm.py --workdir=DIR`.

This file is kept short: it reads the command line and calls the library.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jax_backtrack import cli, recipes

FLAGS = flags.FLAGS
_KEY_FLAGS = (
    "config",
    "workdir",
    "mode",
    "prompts",
    "records",
    "topology",
    "workdirs",
    "coordinator",
    "processes",
    "process",
    "debug",
)

config_flags.DEFINE_config_file("config", None, f"Recipe: a path, or a name in {recipes.FOLDER}.")
flags.DEFINE_string(
    "workdir",
    None,
    "Folder of all that the run leaves. --mode=compile takes runs/compile by default; --mode=show-data needs none.",
)
flags.DEFINE_string("mode", "train", f"One of {', '.join(cli.MODES)}.")
flags.DEFINE_string(
    "prompts", None, "For --mode=sample: a file of prompts (.txt, .jsonl, .csv); standard input if none."
)
flags.DEFINE_integer("records", None, "For --mode=show-data: how many records of each path are printed; 3 if none.", 0)
flags.DEFINE_list(
    "topology", [], "For --mode=compile: TPU topologies to compile for, as in v5e:4x4,v5p:2x2x2,v5e:4x4*2."
)
flags.DEFINE_list("workdirs", [], "For --mode=compare: workdirs that were evaluated; shows them side by side.")
flags.DEFINE_string("coordinator", None, "Of several hosts: HOST:PORT of the one that runs --process=0.")
flags.DEFINE_integer("processes", None, "Of several hosts: how many there are.")
flags.DEFINE_integer("process", None, "Of several hosts: which one this is, from 0.")
flags.DEFINE_bool("debug", False, "Shows the traceback of an error that is otherwise said in one line.")
flags.mark_flags_as_required(["config"])


def main(argv):
    """Runs one mode; what is wrong with the input is said in one line, without a traceback."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"not a flag: {' '.join(argv[1:])}")
    placement = FLAGS.coordinator, FLAGS.processes, FLAGS.process
    code = cli.run(
        FLAGS.mode,
        FLAGS.config,
        FLAGS.workdir,
        prompts=FLAGS.prompts,
        records=FLAGS.records,
        topology=FLAGS.topology,
        workdirs=FLAGS.workdirs,
        placement=placement,
        debug=FLAGS.debug,
    )
    sys.exit(code)


def run():
    """Runs the command: `jax-backtrack`, or `python main.py` in the repository."""
    recipes.make_importable()
    # --help shows what belongs to the started program, and these flags are defined in a module that it imports.
    sys.modules["__main__"].__doc__ = __doc__
    for name in _KEY_FLAGS:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])
    app.run(main, argv=cli.with_config_path(sys.argv, recipes.FOLDER), flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
