#!/usr/bin/env bash
# make wheel-test: builds sdist and, from it, the wheel, installs the wheel into an empty environment
# and runs every command there, from an empty folder, HOME being empty too.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/build"
"$work/build/bin/pip" install -qq build
rm -rf "$checkout/dist"
"$work/build/bin/python" -m build --outdir "$checkout/dist" "$checkout" >"$work/build.log" 2>&1 || {
  cat "$work/build.log"
  exit 1
}
ls -l "$checkout/dist"

"${PYTHON:-python3}" -m venv "$work/env"
wheel=$(echo "$checkout"/dist/*.whl)
"$work/env/bin/pip" install -qq --constraint "$checkout/constraints.txt" "$wheel[ui]"
mkdir "$work/home" "$work/empty"
cd "$work/empty"
export HOME="$work/home" PATH="$work/env/bin:$PATH"
unset PYTHONPATH

check() { # check WORDS COMMAND...: the command ends well and says these words
  local words=$1
  shift
  echo "+ $*"
  "$@" >"$work/log" 2>&1 || { tail -n 30 "$work/log"; exit 1; }
  grep -q -e "$words" "$work/log" || { cat "$work/log"; echo "expected: $words"; exit 1; }
}
check "$work/env" python -c 'import microdit_jax; print(microdit_jax.__file__)'
# Nothing but ours, under one name: a convert.py or configs.py of the user's hides none of it.
names=$(python - <<'END'
from importlib.metadata import files
print(*sorted({file.parts[0] for file in files("microdit_jax")} - {".."}))
END
)
echo "+ top-level names: $names"
[[ $names =~ ^microdit_jax\ microdit_jax-[0-9.]+\.dist-info$ ]]
for name in convert configs models; do echo 'raise SystemExit("not this one")' >$name.py; done

for command in microdit-{train,sample,convert,prepare,evaluate,aot,bench,app,report} \
  "python -m microdit_jax.prepare" "python -m microdit_jax.prepare.reformat" \
  "python -m microdit_jax.evaluate" "python -m microdit_jax.app" \
  "python -m microdit_jax.training.report" "python -m microdit_jax.xla.aot" \
  "python -m microdit_jax.xla.bench" "python -m microdit_jax.xla.plot"; do
  check "\-\-[a-z_]*" $command --help
done
check "wrote\|grid in" microdit-sample --prompt="hot pepper" --num_inference_steps=4 --out=drawn
test -s drawn/samples.png
check "step" microdit-train --config=configs/res_256_pretrain.py:runlocal --workdir=run \
  --config.train.steps=4 --config.train.batch_size=8 --config.eval.num_images=8
check "grid in" microdit-sample --model=run --prompt="red apple" --num_inference_steps=2 --out=own
check "error: unknown config key" bash -c \
  'microdit-train --config=configs/demo.py --workdir=x --config.nothing=1; test $? = 2'

python -m microdit_jax.app --port=0 >page.log 2>&1 &
page=$!
until grep -q "^Open " page.log; do
  kill -0 $page 2>/dev/null || { cat page.log; exit 1; }
  sleep 1
done
address=$(sed -n 's/^Open //p' page.log)
check "<title>" python -c "import urllib.request; print(urllib.request.urlopen('$address').read().decode())"
kill $page
echo "the wheel works outside of the checkout"
