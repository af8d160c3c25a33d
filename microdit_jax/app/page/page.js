// The page's whole logic: the form, the stream of a request's events, the gallery.
import { edit, setUpEdit } from "/edit.js";

const $ = (id) => document.getElementById(id);
const KEPT = "microdit_jax gallery"; // in this browser: settings and image names, no images
const MOST_KEPT = 60;
const choices = await (await fetch("/choices")).json();
let gallery = readGallery();
let running = null; // aborts the request that this page waits for
let shown = null; // the gallery's entry in the dialog

const model = () => choices.models.find((one) => one.name === $("model").value);
const side = (name) => choices.models.find((one) => one.name === name)?.side ?? 512;

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
  fill({ ...defaults, model: first.name, prompt: "", guidance_scale: first.guidance_scale });
  say("", null);
  $("stage").replaceChildren(element("p", "Say what to show. The image takes shape here."));
  renderGallery();

  $("form").addEventListener("submit", (event) => { event.preventDefault(); sample(asked()); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
  });
  $("prompt").addEventListener("input", showForm);
  $("guidance").addEventListener("input", showForm);
  $("model").addEventListener("change", () => {
    $("steps").value = model().student ? 4 : choices.solvers[$("solver").value].steps;
    showForm();
  });
  $("solver").addEventListener("change", () => { $("steps").value = choices.solvers[$("solver").value].steps; });
  $("dice").addEventListener("click", () => { $("seed").value = anySeed(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => { gallery = []; saveGallery(); });
  $("close").addEventListener("click", () => $("details").close());
  $("details").addEventListener("click", (event) => { if (event.target === $("details")) $("details").close(); });
  $("use").addEventListener("click", () => { fill(shown.request); $("details").close(); });
  $("again").addEventListener("click", () => {
    const { strength, ...request } = shown.request; // with the image that is chosen now, if any
    fill(request);
    $("details").close();
    sample({ ...request, ...edit() });
  });
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
  $("examples").replaceChildren(...model().examples.map((text) => {
    const button = element("button", text);
    button.type = "button";
    button.addEventListener("click", () => { $("prompt").value = text; showForm(); });
    return button;
  }));
}

const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// --------------------------------------------------------------------------------- one request

async function sample(request) {
  if (running) return;
  running = new AbortController();
  complain("error", "");
  complain("warning", "");
  busy(true);
  say("sending", null);
  let tiles = [];
  try {
    const answer = await fetch("/sample", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error);
    for await (const event of lines(answer.body)) {
      if (event.event === "queued") say(event.ahead ? `${event.ahead} before you` : "next in line", 0);
      if (event.event === "warning") complain("warning", event.message);
      if (event.event === "error") throw new Error(event.message);
      if (event.event === "started") tiles = stage(event.of, side(request.model));
      if (event.event === "step") follow(event, request, tiles);
      if (event.event === "done") finish(event, request, tiles);
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    for (const tile of tiles) tile.classList.remove("sampling");
    say(stopped ? "stopped" : "", null);
    if (!stopped) complain("error", error instanceof TypeError ? "the server does not answer; is it still running?" : error.message);
  } finally {
    running = null;
    busy(false);
  }
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

function stage(count, pixels) {
  const columns = count === 1 ? 1 : count <= 4 ? 2 : Math.min(4, Math.ceil(count / 2));
  $("stage").style.setProperty("--columns", columns);
  const room = columns === 1 ? 480 : 720 / columns;
  $("stage").style.setProperty("--tile", `${Math.min(room, 8 * pixels)}px`);
  const tiles = Array.from({ length: count }, () => imageTile(null));
  for (const tile of tiles) tile.classList.add("sampling");
  $("stage").replaceChildren(...tiles);
  say("starting", 0);
  return tiles;
}

function follow(event, request, tiles) {
  const { first, together } = event;
  const part = together < request.count ? `images ${first + 1} to ${first + together}: ` : "";
  say(`${part}step ${event.step} of ${request.num_inference_steps}`, event.fraction);
  (event.previews ?? []).forEach((address, i) => setImage(tiles[event.first + i], address));
}

function finish(event, request, tiles) {
  const many = event.images.length === 1 ? "1 image" : `${event.images.length} images`;
  say(`${many} in ${event.seconds} s`, null);
  event.images.forEach((name, index) => {
    const { image, mask, ...rest } = request; // too large to keep
    const entry = { name, index, request: rest };
    tiles[index].classList.remove("sampling");
    setImage(tiles[index], address(entry));
    tiles[index].addEventListener("click", () => open(entry));
    gallery.unshift(entry);
  });
  saveGallery();
  if ($("new-seed").checked) $("seed").value = anySeed();
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
  $("sample").disabled = on;
  $("sample").textContent = on ? "Sampling" : "Sample";
  $("stop").hidden = !on;
}

// --------------------------------------------------------------------------------- the gallery

const address = (entry) => `/images/${encodeURIComponent(entry.name)}`;

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text; // never as HTML: prompts are shown as they are
  return made;
}

function imageTile(source, words = "") {
  const tile = element("button", "");
  const image = document.createElement("img");
  tile.type = "button";
  tile.className = "image";
  image.alt = words;
  image.hidden = true;
  tile.append(image);
  if (source) setImage(tile, source);
  return tile;
}

function setImage(tile, source) {
  const image = tile.firstElementChild;
  image.src = source;
  image.hidden = false;
}

function renderGallery() {
  $("gallery-head").hidden = gallery.length === 0;
  $("gallery").replaceChildren(...gallery.map((entry) => {
    const figure = element("figure", "");
    const tile = imageTile(address(entry), entry.request.prompt);
    tile.addEventListener("click", () => open(entry));
    tile.firstElementChild.addEventListener("error", () => {
      // The server keeps the newest images only; the settings of all are here.
      tile.replaceChildren(element("span", "no longer kept; press to see its settings"));
      tile.classList.add("gone");
    }, { once: true });
    const caption = element("figcaption", entry.request.prompt);
    caption.title = entry.request.prompt;
    figure.append(tile, caption);
    return figure;
  }));
}

function open(entry) {
  const request = entry.request;
  shown = entry;
  $("details-image").src = address(entry);
  $("details-prompt").textContent = request.prompt;
  const rows = {
    Model: request.model,
    Guidance: request.guidance_scale,
    Steps: request.num_inference_steps,
    Seed: request.seed,
    Image: `${entry.index + 1} of ${request.count}`,
  };
  if (request.solver) rows.Solver = `${request.solver}, ${request.guidance}`;
  if (request.negative_prompt) rows.Without = request.negative_prompt;
  if (request.strength) rows.Strength = request.strength;
  $("details-settings").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
  $("download").href = address(entry);
  $("details").showModal();
}

function readGallery() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT)) ?? [];
    return kept.filter((entry) => typeof entry.name === "string" && typeof entry.request?.prompt === "string");
  } catch {
    return []; // written by another version, or storage is off
  }
}

function saveGallery() {
  gallery = gallery.slice(0, MOST_KEPT);
  try {
    localStorage.setItem(KEPT, JSON.stringify(gallery));
  } catch { /* a private window without storage: the gallery lasts as long as the page */ }
  renderGallery();
}

setUp(); // last, when all that it uses is there
