#!/usr/bin/env bash
# From a bare machine to a trained model: sets up .venv and trains the default model with 2 ranks on
# the Python standard library's own source files. See _setup.sh for what can be set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

setup mpich
mpiexec -n 2 hpcml train jobs/demo.toml run.dir=runs/demo run.overwrite=true </dev/null
cat <<END

Results in $PWD/runs/demo:
  summary.json        final losses, parameters, seconds
  metrics.jsonl       one line a step
  model.safetensors   the weights
  config.toml         every setting of the run
More text from the model:
  .venv/bin/hpcml sample runs/demo --prompt "def "
END
