// A moment of a text is a list of cells [piece or null where masked, commit step, confidence]; a frame is what a step
// changed of it: [position, ...cell] of each position.
const $ = id => document.getElementById(id);
const style = getComputedStyle(document.documentElement);
let mode = "confidence";
function confidenceColor(p) {
  const read = name => style.getPropertyValue(name).match(/[\d.]+/g).map(Number);
  const [a, b] = [read("--uncertain"), read("--confident")];
  const mix = a.map((x, i) => x + (b[i] - x) * p);
  return `hsl(${mix[0]} ${mix[1]}% ${mix[2]}%)`;
}
function stepColor(fraction) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return `hsl(${265 - 215 * fraction} ${dark ? 38 : 70}% ${dark ? 30 : 84}%)`;
}
const color = fraction => mode === "confidence" ? confidenceColor(fraction) : stepColor(fraction);
function cellsAt(frames, at) {
  const cells = [];
  for (let i = 0; i <= at; i++) for (const [position, ...cell] of frames[i]) cells[position] = cell;
  return cells;
}
// Shows cells in an element; `hidden` is what a masked position shows, unreadably, and `fresh` the step to point out.
function draw(element, cells, hidden, fresh, lastStep) {
  while (element.children.length < cells.length) element.append(document.createElement("span"));
  while (element.children.length > cells.length) element.lastChild.remove();
  let written = 0, total = 0;
  cells.forEach(([piece, commitStep, p], i) => {
    const s = element.children[i], prompt = piece !== null && commitStep === 0;
    if (!prompt) { total++; if (piece !== null) written++; }
    s.textContent = piece === null ? hidden(i) : piece;
    s.className = piece === null ? "masked" : prompt ? "prompt" : "";
    if (piece !== null && !prompt && commitStep === fresh) s.classList.add("fresh");
    s.style.backgroundColor = piece === null || prompt ? "" : color(mode === "confidence" ? p : commitStep / lastStep);
    s.title = prompt ? "prompt" : piece === null ? "masked" : `step ${commitStep}, probability ${p.toFixed(2)}`;
  });
  return [written, total];
}
function chooseMode(name) {
  mode = name;
  for (const id of ["confidence", "commit_step"]) $(id).setAttribute("aria-pressed", id === name);
  $("low").textContent = name === "confidence" ? "uncertain" : "first";
  $("high").textContent = name === "confidence" ? "confident" : "last";
  $("ramp").style.background = `linear-gradient(90deg, ${[0, .25, .5, .75, 1].map(color).join(", ")})`;
}
