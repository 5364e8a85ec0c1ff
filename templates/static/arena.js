// The voting page. It learns of a trial its token and nothing else; pictures are picture/TOKEN/0 (query), 1.. (row A), ..
// A vote is kept until the server has acknowledged it, over reloads too. The next trial is fetched while this one is judged.

const $ = (id) => document.getElementById(id);
const trialBox = $("trial");
const LENGTH = Number(trialBox.dataset.length);
const SIZE = Number(trialBox.dataset.size);
const NEEDED = Number(trialBox.dataset.needed);
const CSRF = document.querySelector("[name=csrf]").value;
const WORDS = JSON.parse(trialBox.dataset.choices); // of each choice

let current = null; // {trial, images, words} now on the page
let ahead = null; // promise of the next one
let undoable = null; // token of the vote that undo takes back
let busy = true; // loading, or a vote is on its way
let lastWords = ""; // what became of the vote before: stays in the status line, so that nobody misses it
const unseen = new Set(); // pictures of the rows that have not been on screen yet

// ---------------------------------------------------------------------------------------------------------------------
// Storage that may be forbidden

function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function store(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // the page works without it; only a reload in the middle of a failing vote would forget that vote
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Talking to the server

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** Show what is wrong, and wait: longer each time, or until "Try now" is pressed. */
function trouble(text, attempt) {
  $("trouble").textContent = text;
  $("banner").hidden = false;
  return new Promise((resolve) => {
    const timer = setTimeout(done, Math.min(8000, 1000 * 2 ** attempt));
    function done() {
      clearTimeout(timer);
      $("retry").removeEventListener("click", done);
      resolve();
    }
    $("retry").addEventListener("click", done);
  });
}

/** POST a form until the server has understood: lost connections and 5xx are tried again for as long as it takes. */
async function post(path, body) {
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(path, {
        method: "POST",
        headers: { "X-CSRF-Token": CSRF },
        body: new URLSearchParams(body),
        signal: AbortSignal.timeout(15000),
      });
      if (response.status < 500) {
        const data = await response.json();
        $("banner").hidden = true;
        return { status: response.status, data };
      }
    } catch {
      // no answer: the same as an answer that it could not be done
    }
    const kept = path === "vote" ? "Your answer is not saved yet. It is kept here and sent again." : "No answer from the arena. Trying again.";
    await trouble(kept, attempt);
  }
}

/** A decoded picture; null when six tries fail. */
async function picture(token, place, alt) {
  for (let attempt = 0; attempt < 6; attempt++) {
    const image = new Image(SIZE, SIZE);
    image.alt = alt;
    image.draggable = false;
    image.src = `picture/${token}/${place}`;
    try {
      await image.decode();
      return image;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, Math.min(2000, 300 * 2 ** attempt)));
    }
  }
  return null;
}

/** The trial described by an answer of the server, with all its pictures decoded; null if it is out of date. */
async function withPictures(data) {
  if (!data.trial) return data;
  const wanted = [];
  if (data.words === undefined) wanted.push([0, "Query picture"]);
  for (const [index, row] of ["A", "B"].entries()) {
    for (let rank = 1; rank <= LENGTH; rank++) wanted.push([index * LENGTH + rank, `Row ${row}, result ${rank} of ${LENGTH}`]);
  }
  const images = await Promise.all(wanted.map(([place, alt]) => picture(data.trial, place, alt)));
  return images.includes(null) ? null : { ...data, images };
}

async function prepare(after) {
  const { status, data } = await post("trial", after ? { after } : {});
  if (status === 403) location.assign("./");
  return status === 200 ? withPictures(data) : null;
}

// ---------------------------------------------------------------------------------------------------------------------
// Showing

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        unseen.delete(entry.target);
        watcher.unobserve(entry.target);
      }
    }
    refreshButtons();
  },
  { threshold: 0.5 },
);

function refreshButtons() {
  for (const button of document.querySelectorAll("[data-choice]")) {
    const ready = !busy && current && (unseen.size === 0 || button.dataset.choice === "N");
    button.setAttribute("aria-disabled", String(!ready));
  }
  $("undo").setAttribute("aria-disabled", String(busy || !undoable));
  if (current && !busy && unseen.size === 0) say(`${lastWords}Which row fits better?`);
}

function showProgress(data) {
  const left = Math.max(0, NEEDED - data.decided);
  $("bar").value = Math.min(NEEDED, data.decided);
  $("count").textContent = `${data.votes} by you · ${left ? `${left} to go` : "enough; more still helps"}`;
}

function listed(image) {
  const item = document.createElement("li");
  item.append(image);
  return item;
}

function show(trial, message) {
  busy = false;
  watcher.disconnect();
  unseen.clear();
  undoable = trial.undo;
  showProgress(trial);
  trialBox.setAttribute("aria-busy", "false");
  if (!trial.trial) {
    current = null;
    trialBox.hidden = true;
    say("You have judged everything there is. Thank you! Press Quit to finish.");
    refreshButtons();
    return;
  }
  trialBox.hidden = false;
  current = trial;
  const images = [...trial.images];
  if (trial.words === undefined) $("query").replaceChildren(images.shift());
  else $("words").textContent = trial.words;
  $("row-a").replaceChildren(...images.slice(0, LENGTH).map(listed));
  $("row-b").replaceChildren(...images.slice(LENGTH).map(listed));
  for (const item of document.querySelectorAll(".results > li")) {
    unseen.add(item);
    watcher.observe(item);
  }
  lastWords = message;
  say(`${message}Look at both rows.`);
  window.scrollTo(0, 0);
  if (!$("keys").open) $("question").focus({ preventScroll: true });
  refreshButtons();
  ahead = prepare(trial.trial);
}

/** Show the trial that `coming` promises; where that is out of date, what the server says is current. */
async function proceed(coming, message = "") {
  busy = true;
  trialBox.setAttribute("aria-busy", "true");
  refreshButtons();
  let trial = coming ? await coming : null;
  for (let attempt = 0; trial === null; attempt++) {
    if (attempt) await trouble("The pictures could not be loaded. Trying again.", attempt);
    trial = await prepare(null);
  }
  $("banner").hidden = true;
  show(trial, message);
}

// ---------------------------------------------------------------------------------------------------------------------
// Answering

async function send(pending) {
  const { status, data } = await post("vote", pending);
  store("pending", null);
  if (status === 403) location.assign("./");
  return { status, data };
}

async function vote(choice) {
  if (busy || !current) return;
  if (unseen.size && choice !== "N") {
    say("Scroll until you have seen both rows; then answer.");
    return;
  }
  busy = true;
  refreshButtons();
  const pending = { trial: current.trial, choice };
  store("pending", pending);
  const { status, data } = await send(pending);
  if (status !== 200) return proceed(null, `${data.error} `);
  const coming = await ahead;
  const fresh = coming && { ...coming, undo: data.trial, votes: data.number };
  if (fresh && (choice === "A" || choice === "B")) fresh.decided += 1; // the server counts anew, each query once
  return proceed(fresh, `Saved: ${WORDS[choice]}. `);
}

async function undo() {
  if (busy) return;
  if (!undoable) return say("There is nothing to undo.");
  busy = true;
  refreshButtons();
  const { status, data } = await post("undo", { trial: undoable });
  return proceed(status === 200 ? withPictures(data) : null, status === 200 ? "Taken back. " : `${data.error} `);
}

function quit() {
  $("quit").requestSubmit();
}

function help() {
  if ($("keys").open) $("keys").close();
  else $("keys").showModal();
}

const ACTIONS = { u: undo, q: quit, "?": help };
for (const choice in WORDS) ACTIONS[choice.toLowerCase()] = () => vote(choice);

document.addEventListener("keydown", (event) => {
  if (!$("use-keys").checked || event.repeat || event.isComposing) return;
  if (event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key !== "?")) return;
  if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
  const foreign = event.key.length === 1 && event.key > "\x7f"; // another alphabet: take the key by its place
  const key = foreign && event.code.startsWith("Key") ? event.code.slice(3).toLowerCase() : event.key.toLowerCase();
  if (!Object.hasOwn(ACTIONS, key) || ($("keys").open && key !== "?")) return;
  event.preventDefault();
  ACTIONS[key]();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => vote(button.dataset.choice));
}
$("undo").addEventListener("click", undo);
$("help").addEventListener("click", help);
$("quit").addEventListener("submit", (event) => {
  if (stored("pending")) {
    event.preventDefault();
    say("Your last answer is being saved; quit in a moment.");
  }
});
$("use-keys").checked = stored("keys") !== false;
$("use-keys").addEventListener("change", () => {
  store("keys", $("use-keys").checked);
  document.body.classList.toggle("no-keys", !$("use-keys").checked);
});
document.body.classList.toggle("no-keys", !$("use-keys").checked);
window.addEventListener("pageshow", (event) => event.persisted && location.reload());

const kept = stored("pending");
const answer = kept && (await send(kept));
await proceed(null, answer ? (answer.status === 200 ? "Your last answer is saved. " : `${answer.data.error} `) : "");
