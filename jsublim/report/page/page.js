// Saves a figure as SVG or PNG and a table as CSV: each is made from what the page shows, when it is asked for.
function save(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

function drawn(svg) {
  const copy = svg.cloneNode(true), { width, height } = svg.getBoundingClientRect(), style = getComputedStyle(svg);
  const room = 16;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("style", `color: ${style.color}; font-family: ${style.fontFamily}`);
  const ground = getComputedStyle(svg.closest("section")).backgroundColor;
  const outer = `<svg xmlns="http://www.w3.org/2000/svg" width="${width + 2 * room}" height="${height + 2 * room}">` +
    `<rect width="100%" height="100%" fill="${ground}"/><svg x="${room}" y="${room}" width="${width}" height="${height}" ` +
    `overflow="visible">${new XMLSerializer().serializeToString(copy)}</svg></svg>`;
  return "data:image/svg+xml;charset=utf-8," + encodeURIComponent(outer);
}

function savePicture(svg) {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * image.width;
    canvas.height = 2 * image.height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    save(canvas.toDataURL("image/png"), svg.dataset.name + ".png");
  };
  image.src = drawn(svg);
}

function asCsv(table) {
  const cell = (text) => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const line = (row) => [...row.cells].map((each) => cell(each.innerText.trim().replaceAll("\n", " "))).join(",");
  return "data:text/csv;charset=utf-8," + encodeURIComponent([...table.rows].map(line).join("\r\n") + "\r\n");
}

function offer(after, choices) {
  const bar = document.createElement("div");
  bar.className = "save";
  for (const [label, what, act] of choices) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-label", `save ${what} as ${label}`);
    button.onclick = act;
    bar.append(button);
  }
  after.after(bar);
}

for (const svg of document.querySelectorAll("svg[data-name]")) {
  const what = svg.querySelector("title").textContent;
  offer(svg, [
    ["SVG", what, () => save(drawn(svg), svg.dataset.name + ".svg")],
    ["PNG", what, () => savePicture(svg)],
  ]);
}
for (const table of document.querySelectorAll("table[data-name]")) {
  const name = table.dataset.name;
  offer(table.closest(".scroll"), [["CSV", name.replaceAll("-", " "), () => save(asCsv(table), name + ".csv")]]);
}

// A table that is wider than its place says so until its end is reached.
for (const frame of document.querySelectorAll(".scroll")) {
  const look = () => {
    frame.classList.toggle("wider", frame.scrollWidth > frame.clientWidth);
    frame.classList.toggle("end", frame.scrollLeft + frame.clientWidth >= frame.scrollWidth - 2);
  };
  new ResizeObserver(look).observe(frame);
  frame.addEventListener("scroll", look);
}

// What is folded is open where a link leads to it, and on paper.
const unfold = (selector) => document.querySelectorAll(selector).forEach((each) => (each.open = true));
const linked = () => location.hash && unfold(`#${CSS.escape(location.hash.slice(1))} > details`);
addEventListener("hashchange", linked);
addEventListener("beforeprint", () => unfold("details"));
linked();
