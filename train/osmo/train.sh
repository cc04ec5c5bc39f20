#!/usr/bin/env bash
# What each node of osmo-workflow.yaml runs: resume from the run's checkpoints, train, upload the policy.
#
#   bash train.sh "key=value ..."       with the environment that osmo-workflow.yaml sets
#
# It trains in $CHECKPOINTS. OSMO uploads $UPLOADS from time to time, where nothing is half-written, and nothing goes while it may
# be read: a failing upload would end the training.
#
# Exit codes: 0 trained; 3 trained, faulty recordings skipped; 1 error to fix; 75 interrupted, run again to resume.
# No two braces, nor one before # or %, in this file: the server renders it as a template.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p "$CHECKPOINTS" "$UPLOADS/owners"
stage=$(mktemp -d "$(dirname "$UPLOADS")/.stage.XXXX") # beside it: a rename must not copy
python train.py --help >/dev/null # a broken image or script must not be run again

arrived() { # OSMO's download exits with 0 when files failed: are all of URL $1, by regex $3, in folder $2?
  local listed expected found
  listed=$(osmo data list "$1" -r --no-pager -x "$3" 2>&1) || {
    echo "note: $1 cannot be listed from here; not checked whether all of it arrived"
    return 0
  }
  expected=$(sed -n 's/^Total \([0-9]*\) objects* found$/\1/p' <<<"$listed")
  found=$(find "$2" -path "$BEFORE/owners" -prune -o -type f -print | wc -l)
  if [ "$found" -lt "${expected:-0}" ]; then
    echo "error: $1: only $found of $expected files arrived in $2; run it again" >&2
    exit 75
  fi
}
if [ -n "$BAGS_URL" ]; then arrived "$BAGS_URL" "$BAGS" "$BAGS_REGEX"; fi

seconds() { # of OSMO's durations, such as 10m
  case "$1" in
    *m) echo $((${1%m} * 60)) ;;
    *h) echo $((${1%h} * 3600)) ;;
    *d) echo $((${1%d} * 86400)) ;;
    *[!0-9s]*) echo 600 ;; # another kind, such as PT1H
    *) echo "${1%s}" ;;
  esac
}
renewal=$(seconds "$UPLOAD_EVERY") started=$(date +%s)

own() { # say in the run's storage that this workflow is at work, or, with 0, that it is not
  echo "${1:-$(date +%s)} $started" >"$stage/owner" && mv "$stage/owner" "$UPLOADS/owners/$WORKFLOW"
}

alone() { # two workflows would write the same checkpoints: the one that started first stays
  local other renewed since place="$RUN_URL/checkpoints" found="$stage/owners"
  own && mkdir -p "$found"
  osmo data upload "$place" "$UPLOADS/owners" >/dev/null 2>&1 || true
  sleep "${SETTLE:-20}" # until those of a workflow that starts now can be seen
  osmo data download "$place" "$found" --regex 'owners/.*' >/dev/null 2>&1 || true
  for other in "$found"/owners/*; do
    [ -e "$other" ] && [ "$(basename "$other")" != "$WORKFLOW" ] || continue
    read -r renewed since <"$other" || true
    if [ $((renewed + 3 * renewal)) -lt "$started" ]; then
      if [ "$renewed" != 0 ]; then echo "note: $(basename "$other") was at work on this run, and is taken over: it is silent"; fi
    elif [ "$since" -lt "$started" ] || { [ "$since" = "$started" ] && [[ "$(basename "$other")" < "$WORKFLOW" ]]; }; then
      echo "error: $RUN_URL: $(basename "$other") is at work on this run, or was until $((($(date +%s) - renewed) / 60)) minutes ago;" \
        "cancel it and wait $((3 * renewal / 60)) minutes, or: osmo data delete $place/owners" >&2
      exit 1
    fi
  done
}

publish() { # into $UPLOADS: complete checkpoints as hard links, the rest as copies
  local checkpoint name file old
  own
  python -m training.run_folder "$CHECKPOINTS" 2>/dev/null | while read -r checkpoint; do # the newest, then the best
    name=$(basename "$checkpoint")
    if [ ! -e "$UPLOADS/$name" ]; then
      rm -rf "${stage:?}/$name"
      cp -al "$checkpoint" "$stage/$name" && mv -T "$stage/$name" "$UPLOADS/$name" # all on one disk
    fi
    touch "$stage/wanted.$name"
  done
  find "$CHECKPOINTS" -mindepth 1 \( -name '.*' -o -path "$CHECKPOINTS/checkpoint_*" \) -prune -o -type f -printf '%P\n' |
    while read -r file; do # metrics.jsonl, best.json, config.yaml, pages, TensorBoard's events
      mkdir -p "$UPLOADS/$(dirname "$file")"
      cp "$CHECKPOINTS/$file" "$stage/copy" && mv "$stage/copy" "$UPLOADS/$file"
    done
  # not while an upload reads it, and not before three had the time to
  grep -qsaP 'data\x00upload' /proc/[0-9]*/cmdline && return
  find "$stage" -name 'wanted.*' ! -newermt "@$(($(date +%s) - 3 * renewal))" | while read -r old; do
    name=$(basename "${old#*wanted.}")
    mv "$UPLOADS/$name" "$stage/$name" && rm -r "${stage:?}/$name" "$old"
  done
}

if [ "$NODE" = 0 ]; then
  # A failing upload of checkpoints is silent, or ends the training: so check it before the first step.
  access=$(osmo data check "$RUN_URL" --access-type WRITE 2>&1) && code=0 || code=$?
  if [ "$code" = 10 ] || [ "$code" = 75 ]; then # the server is down or busy: OSMO waits for it
    echo "note: $RUN_URL: not checked whether checkpoints can be uploaded there (${access//$'\n'/ })"
  elif [[ $access != *'"status": "pass"'* ]]; then
    echo "error: $RUN_URL: checkpoints cannot be uploaded there (${access//$'\n'/ }); check that the container or bucket exists" \
      "and that your DATA credential may write to it (osmo credential list)" >&2
    exit 1
  fi
  # a stage of its own: what the loop was copying may go on for a moment
  trap 'status=$?; kill $(jobs -p) 2>/dev/null || true; stage=$(mktemp -d "$stage.XXXX"); if [ -n "${mine:-}" ]; then publish || true; fi; own 0; exit "$status"' EXIT
  alone
  mine=yes
  # Checkpoints in the pod are newer: OSMO may run this again in the same pod.
  if [ -z "$(python -m training.run_folder "$CHECKPOINTS" 2>/dev/null)" ]; then
    arrived "$RUN_URL/checkpoints" "$BEFORE" '(?!owners/).*'
    if [ -f "$BEFORE/metrics.jsonl" ]; then cp "$BEFORE/metrics.jsonl" "$CHECKPOINTS/"; fi
    python -m training.run_folder "$BEFORE" | while read -r checkpoint; do # the newest, then the best
      name=$(basename "$checkpoint")
      rm -rf "${CHECKPOINTS:?}/$name" "$CHECKPOINTS/.$name.tmp"
      cp -r "$checkpoint" "$CHECKPOINTS/.$name.tmp"
      mv "$CHECKPOINTS/.$name.tmp" "$CHECKPOINTS/$name"
    done
  fi
  while sleep "${PUBLISH_EVERY:-20}"; do publish || true; done >/dev/null 2>&1 &
  if [ "${TENSORBOARD:-0}" != 0 ]; then # it may fail; nothing depends on it
    tensorboard --logdir "$CHECKPOINTS/tensorboard" --port "$TENSORBOARD" --bind_all >/dev/null 2>&1 &
  fi
fi

parsed=$(mktemp)
xargs -r printf '%s\0' <<<"${1:-}" >"$parsed" || { # shell quotes, no expansion
  echo "error: settings: $1: cannot parse; is a quote left open?" >&2
  exit 1
}
mapfile -d '' -t settings <"$parsed"
settings+=("output_dir=$CHECKPOINTS") # what is uploaded
processes=$((GPUS > 0 ? GPUS : 1))
if [ "$GPUS" -gt 0 ]; then # a pod whose torch sees no GPU must not train on its CPUs
  settings=(training.device=cuda "${settings[@]}")
fi
export OMP_NUM_THREADS=$CPUS # for each
status=0
if [ "$processes" = 1 ] && [ "$NODES" = 1 ]; then
  python train.py --config osmo-config.yaml "${settings[@]}" || status=$?
else
  place=(--standalone)
  if [ "$NODES" -gt 1 ]; then
    place=(--nnodes "$NODES" --node_rank "$NODE" --master_addr "$LEAD" --master_port "${PORT:-29500}")
  fi
  EXIT_CODE_FILE=$(mktemp)
  export EXIT_CODE_FILE
  torchrun "${place[@]}" --nproc_per_node "$processes" train.py --config osmo-config.yaml "${settings[@]}" || status=$?
  # torchrun ends with 1 whatever its processes ended with; stopped or killed ones write no code
  if [ -s "$EXIT_CODE_FILE" ]; then
    status=$(<"$EXIT_CODE_FILE")
  elif [ "$status" != 0 ]; then
    status=75
  fi
fi

if [ "$NODE" = 0 ] && { [ "$status" = 0 ] || [ "$status" = 3 ]; }; then
  last=$(python -m training.run_folder "$CHECKPOINTS") # the newest, then the best
  last=${last%%$'\n'*}
  cp -r "$last/pretrained_model" "$CHECKPOINTS/metrics.jsonl" "$CHECKPOINTS/config.yaml" "$OUTPUT/"
  echo "policy: $RUN_URL/pretrained_model"
fi
exit "$status"
