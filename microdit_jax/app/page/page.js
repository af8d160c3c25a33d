// The form, and the stream of a request's events; the images go to the gallery.
import { edit, setUpEdit } from "/edit.js";
import { add, address, element, imageTile, open, setImage, setUpGallery } from "/gallery.js";

const $ = (id) => document.getElementById(id);
const FORM = "microdit_jax form"; // in this tab: what the form holds
const JOB = "microdit_jax job"; // in this tab: the request that it follows
const LEFT = "microdit_jax left to finish"; // in this browser: requests that outlive their page
const TRIES = 20; // to reach a server again, 2 s each
const choices = await (await fetch("/choices")).json();
let running = null; // aborts the request that this page waits for

const model = () => choices.models.find((one) => one.name === $("model").value);
const side = (name) => choices.models.find((one) => one.name === name)?.side ?? 512;
const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function setUp() {
  const { limits, defaults } = choices;
  for (const one of choices.models) $("model").append(new Option(one.name, one.name));
  $("model-field").hidden = choices.models.length === 1;
  $("guidance").max = limits.guidance;
  $("steps").max = limits.steps;
  $("count").max = limits.count;
  $("seed").max = limits.seed;
  for (const name of Object.keys(choices.solvers)) $("solver").append(new Option(name, name));
  for (const name of choices.guidances) $("guidance-kind").append(new Option(name, name));
  setUpEdit(() => model().side, complain);
  const [first] = choices.models;
  fill({
    ...defaults, model: first.name, prompt: "", guidance_scale: first.guidance_scale,
    seed: anySeed(), ...read(sessionStorage, FORM), ...linked(),
  });
  say("", null);
  $("stage").replaceChildren(element("p", "Say what to show. The image takes shape here."));
  setUpGallery({
    use: fill,
    again: ({ strength, ...request }) => { // with the image that is chosen now, if any
      fill(request);
      sample({ ...request, ...edit() });
    },
  });

  $("form").addEventListener("submit", (event) => { event.preventDefault(); sample(asked()); });
  $("form").addEventListener("input", keepForm);
  $("form").addEventListener("change", keepForm);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("prompt").addEventListener("input", showForm);
  $("guidance").addEventListener("input", showForm);
  $("model").addEventListener("change", () => {
    $("steps").value = model().student ? 4 : choices.solvers[$("solver").value].steps;
    showForm();
  });
  $("solver").addEventListener("change", () => { $("steps").value = choices.solvers[$("solver").value].steps; });
  $("dice").addEventListener("click", () => { $("seed").value = anySeed(); keepForm(); });
  $("stop").addEventListener("click", () => running?.stop());
  window.addEventListener("hashchange", () => fill({ ...asked(), ...linked() }));
  comeBack();
}

// ------------------------------------------------------------------------------------ the form

function asked() {
  const number = (id) => ($(id).value.trim() === "" ? null : Number($(id).value));
  const request = {
    model: $("model").value,
    prompt: $("prompt").value,
    guidance_scale: number("guidance"),
    num_inference_steps: number("steps"),
    seed: number("seed"),
    count: number("count"),
    keep: $("keep").checked,
    ...edit(),
  };
  if (model().student) return request; // its solver and guidance are built in
  const sampler = { solver: $("solver").value, guidance: $("guidance-kind").value };
  return { ...request, ...sampler, negative_prompt: $("negative").value };
}

function fill(request) {
  if (choices.models.some((one) => one.name === request.model)) $("model").value = request.model;
  $("prompt").value = request.prompt;
  $("guidance").value = request.guidance_scale;
  $("steps").value = request.num_inference_steps;
  $("seed").value = request.seed;
  $("count").value = request.count;
  // Requests that an earlier version kept have none of these.
  $("solver").value = request.solver ?? choices.defaults.solver;
  $("guidance-kind").value = request.guidance ?? choices.defaults.guidance;
  $("negative").value = request.negative_prompt ?? "";
  showForm();
  keepForm();
}

// Settings in the page's address, as "Copy link" makes them.
function linked() {
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (location.hash && "prompt" in found) history.replaceState(null, "", location.pathname); // or a reload undoes changes
  return "prompt" in found ? found : {};
}

function keepForm() {
  const { image, mask, strength, ...rest } = asked();
  write(sessionStorage, FORM, rest);
}

function showForm() {
  const length = $("prompt").value.length, most = choices.limits.prompt_characters;
  $("prompt-length").textContent = length > most / 2 ? `${length} / ${most}` : "";
  $("prompt-length").classList.toggle("over", length > most);
  $("guidance-shown").textContent = Number($("guidance").value).toFixed(1);
  for (const id of ["guidance-field", "solver", "guidance-kind", "negative-field"]) {
    const field = $(id).closest(".field");
    field.hidden = Boolean(model().student);
  }
  $("about").textContent = `${model().name}, ${model().side} px`;
  const examples = model().examples;
  const there = [...$("examples").children].map((button) => button.textContent);
  if (there.join("\n") === examples.join("\n")) return; // one of them may have the focus
  $("examples").replaceChildren(...examples.map((text) => {
    const button = element("button", text);
    button.type = "button";
    button.addEventListener("click", () => { $("prompt").value = text; showForm(); keepForm(); });
    return button;
  }));
}

function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null; // written by another version, or storage is off
  }
}

function write(storage, name, value) {
  try {
    value === null ? storage.removeItem(name) : storage.setItem(name, JSON.stringify(value));
  } catch { /* storage is off or full: a reload forgets */ }
}

// --------------------------------------------------------------------------------- one request

async function sample(request) {
  await follow({ request, id: null });
}

// What a reload has interrupted, and what earlier pages have left to finish.
async function comeBack() {
  const job = read(sessionStorage, JOB);
  if (job?.id) await follow(job);
  for (const left of read(localStorage, LEFT) ?? []) if (left.id !== job?.id) await follow(left, true);
}

function begin(job, signal) {
  if (job.id) return fetch(`/jobs/${encodeURIComponent(job.id)}`, { signal });
  return fetch("/sample", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(job.request),
    signal,
  });
}

// Follows a request to its end, through a lost network; `quiet`: nobody asked for it just now.
async function follow(job, quiet = false) {
  if (running) return;
  const { image, mask, ...request } = job.request; // those are too large to keep
  const stopped = new AbortController();
  running = { stop: () => { stopped.abort(); if (job.id) fetch(`/jobs/${job.id}`, { method: "DELETE" }); } };
  complain("error", "");
  complain("warning", "");
  busy(true);
  say("sending", null);
  const view = { request, tiles: [], ended: false };
  try {
    for (let left = TRIES; !view.ended; left--) {
      try {
        const answer = await begin(job, stopped.signal);
        if (answer.status === 404 && quiet) break; // the server was started again since
        if (!answer.ok) throw new Error((await answer.json()).error);
        for await (const event of lines(answer.body)) {
          if (event.event === "job") { job.id = event.id; remember({ id: job.id, request }); }
          left = TRIES;
          show(event, view);
        }
        if (!view.ended) throw new TypeError("the stream was cut");
      } catch (error) {
        if (!(error instanceof TypeError) || !job.id || left <= 0) throw error;
        say("the connection is lost; trying again", null);
        await new Promise((resolve) => { setTimeout(resolve, 2000); stopped.signal.addEventListener("abort", resolve); });
      }
    }
    if (quiet && !view.ended) say("", null);
  } catch (error) {
    const asked = error.name === "AbortError";
    for (const tile of view.tiles) tile.classList.remove("sampling");
    say(asked ? "stopped" : "", null);
    if (!asked) complain("error", error instanceof TypeError ? "the server does not answer; is it still running?" : error.message);
  } finally {
    forget(job.id);
    running = null;
    busy(false);
  }
}

function remember(job) {
  write(sessionStorage, JOB, job);
  const left = read(localStorage, LEFT) ?? [];
  if (job.request.keep && !left.some((one) => one.id === job.id)) write(localStorage, LEFT, [...left, job]);
}

function forget(id) {
  write(sessionStorage, JOB, null);
  write(localStorage, LEFT, (read(localStorage, LEFT) ?? []).filter((one) => one.id !== id));
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function show(event, view) {
  if (event.event === "queued") say(event.ahead ? `${event.ahead} before you` : "next in line", 0);
  if (event.event === "warning") complain("warning", event.message);
  if (event.event === "error") throw new Error(event.message);
  if (event.event === "started") stage(event.of, view);
  if (event.event === "step") progress(event, view);
  if (event.event === "done") finish(event, view);
}

function stage(count, view) {
  if (view.tiles.length === count) return; // told again, after the network was lost
  const columns = count === 1 ? 1 : count <= 4 ? 2 : Math.min(4, Math.ceil(count / 2));
  $("stage").style.setProperty("--columns", columns);
  const room = columns === 1 ? 480 : 720 / columns;
  $("stage").style.setProperty("--tile", `${Math.min(room, 8 * side(view.request.model))}px`);
  view.tiles = Array.from({ length: count }, () => imageTile(null));
  for (const tile of view.tiles) tile.classList.add("sampling");
  $("stage").replaceChildren(...view.tiles);
  say("starting", 0);
}

function progress(event, { request, tiles }) {
  const { first, together } = event;
  const part = together < request.count ? `images ${first + 1} to ${first + together}: ` : "";
  say(`${part}step ${event.step} of ${request.num_inference_steps}`, event.fraction);
  (event.previews ?? []).forEach((source, i) => setImage(tiles[event.first + i], source));
}

function finish(event, view) {
  const many = event.images.length === 1 ? "1 image" : `${event.images.length} images`;
  stage(event.images.length, view); // where the end is all that was still to be told
  view.ended = true;
  say(`${many} in ${event.seconds} s`, null);
  const entries = event.images.map((name, index) => ({ name, index, request: view.request }));
  entries.forEach((entry, index) => {
    const tile = view.tiles[index];
    tile.classList.remove("sampling");
    tile.firstElementChild.alt = view.request.prompt;
    setImage(tile, address(entry));
    tile.addEventListener("click", () => open(entry));
  });
  add(entries);
  if ($("new-seed").checked) { $("seed").value = anySeed(); keepForm(); }
}

function say(words, fraction) {
  $("state").textContent = words;
  $("bar").classList.toggle("on", fraction !== null);
  $("bar").firstElementChild.style.width = `${100 * (fraction ?? 0)}%`;
}

function complain(where, words) {
  $(where).textContent = words;
  $(where).hidden = !words;
}

function busy(on) {
  // Not "disabled", which would take the focus away from who pressed it by the keyboard.
  $("sample").setAttribute("aria-disabled", on);
  $("sample").textContent = on ? "Sampling" : "Sample";
  $("stop").hidden = !on;
  // On a phone the form fills the screen: go to where the image appears.
  if (on && matchMedia("(max-width: 820px)").matches) $("results").scrollIntoView({ block: "start" });
}

setUp(); // last, when all that it uses is there
