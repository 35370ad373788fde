#!/usr/bin/env bash
# From a bare clone to a distilled student and its report, on two CPU cores:
#   bash examples/quickstart.sh [key=value ...]
# Run again, it installs and makes nothing that is there, and goes on with the run where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SIZE="${QUICKSTART_SIZE:-full}"                 # full, or tiny: a smaller task for a quick look
CONFIG="${QUICKSTART_CONFIG:-configs/quickstart-cpu.yaml}" # what to train
VENV="${VENV:-.venv}"                           # folder of the environment

bash examples/setup_env.sh
export PYTHON="$PWD/$VENV/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # threads of each rank and of the rollout server
tropd() { "$PYTHON" -m tropd_mcore.cli.main "$@"; }
say() { printf '\n== %s\n' "$*"; }

case "$SIZE" in
  full) MODELS=models/arithmetic RUN=runs/quickstart MAKE=() ;;
  tiny) MODELS=models/arithmetic-tiny RUN=runs/quickstart-tiny MAKE=(--tiny) ;;
  *) echo "error: QUICKSTART_SIZE is '$SIZE', expected full or tiny" >&2; exit 2 ;;
esac
RUN="${QUICKSTART_RUN:-$RUN}"                   # run directory
SETTINGS=(
  "run.dir=$RUN" "student.path=$MODELS/student" "teacher.path=$MODELS/teacher"
  "data.prompts=$MODELS/train.jsonl" "data.teacher_responses=$MODELS/teacher_responses.jsonl" "$@"
)

say "models: a tokenizer, prompts, a teacher and a weaker student ($MODELS)"
"$PYTHON" -m examples.make_models "$MODELS" "${MAKE[@]}"

say "teacher responses, the prefixes that guide the student"
tropd prefixes "$CONFIG" "${SETTINGS[@]}" --max-new-tokens 48

say "accuracy before: the student as it was made"
tropd eval "$CONFIG" "${SETTINGS[@]}" --model "$MODELS/student" --prompts "$MODELS/heldout.jsonl" \
  --out "$RUN/evaluation_before.json"

say "training ($CONFIG)"
bash examples/tropd_pretrain.sh "$CONFIG" "${SETTINGS[@]}"

say "accuracy after: the exported student"
tropd eval "$CONFIG" "${SETTINGS[@]}" --prompts "$MODELS/heldout.jsonl" \
  --out "$RUN/evaluation_after.json" --compare-with "$RUN/evaluation_before.json"

say "report"
tropd report "$RUN"

cat <<END

Everything is in $RUN:
  export/                  the trained student, a Hugging Face folder
  report.html              curves and coloured rollouts
  metrics.jsonl            one line a step
  config.resolved.yaml     every setting and where it came from
  checkpoints/ rollouts/   what a resumed run continues from
END
