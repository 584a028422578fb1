// The timeline of the passes, what those over the model did, what is known of one node, the table of sites.
"use strict";

/** The bar of what compiling took, then the passes: over the model, which `toModel` shows, and over the graph. */
function drawTimeline(container, graph, current, chosen, prepared, toModel) {
  const total = Object.values(graph.seconds).reduce((sum, seconds) => sum + seconds, 0);
  const bar = element("div", "compile");
  Object.entries(graph.seconds).forEach(([name, seconds], i) => {
    const part = element("span", `part part-${i % 5}`, `${name} ${secondsText(seconds)}`);
    part.style.flexGrow = String(Math.max(seconds / (total || 1), 0.02));
    part.title = `${name}: ${secondsText(seconds)} of ${secondsText(total)}`;
    bar.append(part);
  });
  const longest = Math.max(...[...prepared, ...graph.stages].map((each) => each.seconds), 1e-9);
  const passes = element("div", "passes");
  passes.setAttribute("role", "listbox");
  prepared.forEach((pass, index) => {
    const button = passButton(pass, `${pass.found} found`, secondsText(pass.seconds), longest);
    button.classList.add("of-model");
    button.classList.toggle("idle", pass.found === 0);
    button.title = ["over the model", ...pass.notes.slice(0, 8)].join("\n");
    button.addEventListener("click", () => toModel(index));
    passes.append(button);
  });
  graph.stages.forEach((stage, index) => {
    const count = graph.stage(index).entries.length;
    const before = index ? graph.stage(index - 1).entries.length : count;
    const edits = stage.edits === null ? `${count} nodes` : `${stage.edits} edit${stage.edits === 1 ? "" : "s"}`;
    const delta = count === before ? "" : `${count > before ? "+" : "−"}${Math.abs(count - before)}`;
    const time = stage.edits === null ? "as traced" : secondsText(stage.seconds);
    const button = passButton(stage, [edits, delta].filter(Boolean).join(", "), time, longest);
    button.classList.toggle("idle", stage.edits === 0);
    button.setAttribute("aria-selected", String(index === current));
    button.addEventListener("click", () => chosen(index));
    passes.append(button);
  });
  container.replaceChildren(bar, passes);
  const selected = passes.querySelector("[aria-selected=true]");
  if (selected) passes.scrollLeft = selected.offsetLeft - passes.clientWidth / 2 + selected.clientWidth / 2;
}

function passButton(pass, did, time, longest) {
  const meter = element("span", "meter", element("i"));
  meter.firstChild.style.width = `${Math.max(2, (100 * pass.seconds) / longest)}%`;
  const button = element(
    "button", "pass", element("b", "", pass.name), element("span", "", did), element("span", "muted", time), meter,
  );
  button.type = "button";
  button.setAttribute("role", "option");
  button.dataset.pass = pass.name;
  return button;
}

/** What the passes over the model found and did. */
function drawModel(container, prepared) {
  const parts = prepared.map((pass) => element(
    "section", "", element("h3", "", pass.name, element("span", "muted", ` ${pass.found} found, ${secondsText(pass.seconds)}`)),
    element("ul", "", ...pass.notes.map((note) => element("li", "", note))),
  ));
  container.replaceChildren(...(parts.length ? parts : [element("p", "muted", "Nothing is known of the passes over the model.")]));
}

/** The facts of one entry, as pairs of a word and a text or an element. */
function factsOf(entry, stage, measured) {
  const { node, sites } = entry;
  const facts = [["Operator", node.op === "placeholder" ? `an input: ${node.kind || "of the graph"}` : node.target]];
  if (node.value) facts.push(["Result", node.value]);
  if (node.path) facts.push(["Module", node.path]);
  if (node.cls) facts.push(["Class", node.cls]);
  if (node.source) {
    facts.push(["Source", element("span", "", node.source, element("code", "", node.code))]);
  }
  for (const refusal of stage.refusalsOf(entry)) {
    facts.push([`Refused, ${refusal.when}`, element("span", "bad", refusal.reason)]);
  }
  const distinct = (field) => [...new Set(sites.map((site) => site[field]).filter(Boolean))];
  if (sites.length) {
    const lines = (field) => element("span", "", ...distinct(field).map((text) => element("div", "", text)));
    facts.push(["Form", lines("form")], ["Row map", lines("rows")]);
    if (distinct("strategy").length) facts.push(["Strategy", lines("strategy")]);
  }
  facts.push(["Cost", costOf(entry)]);
  const times = [...new Set(sites.map((site) => measured[site.path]).filter(Boolean))];
  if (times.length) facts.push(["Measured", element("span", "", ...times.map((text) => element("div", "", text)))]);
  return facts;
}

function bytesOf(node) {
  return node.itemsize ? node.sizes.reduce((product, size) => product * size, node.itemsize) : 0;
}

function costOf(entry) {
  const { node, sites } = entry;
  const parts = [];
  const inputs = [...new Set(entry.inputs)].map((input) => input.node);
  const sum = (nodes) => nodes.reduce((total, each) => total + bytesOf(each), 0);
  const read = sum(inputs.filter((each) => each.kind !== "bank"));
  const banks = sum(inputs.filter((each) => each.kind === "bank"));
  if (node.op === "placeholder" || node.op === "get_attr") parts.push(`${bytesText(bytesOf(node))} in memory`);
  else if (node.free) parts.push("none: no memory is moved");
  else {
    const written = node.itemsize ? `, writes ${bytesText(bytesOf(node))}` : "";
    parts.push(`reads ${bytesText(read)}${written}, if nothing is fused`);
    if (banks) parts.push(`and of banks, ${bytesText(banks)} with all slots, what the batch's adapters have`);
  }
  if (node.flops) parts.push(flopsText(node.flops));
  const flops = sites.reduce((sum, site) => sum + site.flops, 0);
  if (flops) {
    const ranks = [...new Set(sites.map((site) => site.rank))].join(", ");
    parts.push(`delta of all sites here ${flopsText(flops)} at rank ${ranks}`);
  }
  return `${parts.join("; ")}, at the sizes of the capture`;
}

function drawDetails(container, entry, stage, measured, chosen) {
  container.hidden = !entry;
  if (!entry) return;
  const close = element("button", "close", "×");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => chosen(null));
  const badges = ["refused", "packs", "sites", "changed"]
    .filter((tag) => entry.tags[tag])
    .map((tag) => element("span", `badge ${tag}`, { refused: "refused", packs: "pack", sites: "site", changed: "changed here" }[tag]));
  const list = element("dl", "");
  for (const [word, value] of factsOf(entry, stage, measured)) {
    list.append(element("dt", "", word), element("dd", "", value));
  }
  const parts = [close, element("h2", "", entry.node.name), element("p", "badges", ...badges), list];
  if (entry.sites.length) {
    const items = entry.sites.map((site) =>
      element("li", "", site.path, element("span", "muted", ` ${site.cls}, ${site.k} → ${site.n}, rank ${site.rank}`)));
    const shown = element("details", "", element("summary", "", `${items.length} site${items.length > 1 ? "s" : ""}`), element("ul", "", ...items));
    shown.open = items.length <= 8;
    parts.push(shown);
  }
  parts.push(linksTo("Reads", entry.inputs, chosen), linksTo("Read by", entry.users, chosen));
  parts.push(element("pre", "code", entry.node.line));
  container.replaceChildren(...parts);
  container.scrollTop = 0;
}

function linksTo(heading, entries, chosen) {
  const unique = [...new Set(entries)];
  if (!unique.length) return element("p", "muted", `${heading}: nothing`);
  const links = unique.slice(0, 60).map((entry) => {
    const link = element("button", "link", entry.node.name, element("span", "muted", ` ${entry.node.value}`));
    link.type = "button";
    link.addEventListener("click", () => chosen(entry));
    return element("li", "", link);
  });
  if (unique.length > 60) links.push(element("li", "muted", `and ${unique.length - 60} more`));
  return element("section", "", element("h3", "", `${heading} ${unique.length}`), element("ul", "links", ...links));
}

/** Refusals, then what became of each site. */
function drawSites(container, stage, measured, shown, chosen) {
  const parts = [];
  for (const refusal of stage.refusals) {
    parts.push(element(
      "p", "refusal", element("b", "", `Refused (${refusal.when}): `),
      `${refusal.paths.join(", ")}: ${refusal.reason}`,
    ));
  }
  const body = element("tbody", "");
  const names = ["Site", "Class", "K → N", "Form", "Rows", "Strategy", "Node"];
  if (Object.keys(measured).length) names.push("Measured");
  let count = 0;
  for (const entry of stage.entries) {
    if (!entry.sites.length || !shown(entry)) continue;
    for (const site of entry.sites) {
      count++;
      const link = element("button", "link", entry.node.name);
      link.type = "button";
      link.addEventListener("click", () => chosen(entry));
      const cells = [site.path, site.cls, `${site.k} → ${site.n}`, site.form, site.rows, site.strategy || "not planned yet", link];
      if (names.length > cells.length) cells.push(measured[site.path] || "not run");
      body.append(element("tr", "", ...cells.map((cell) => element("td", "", cell))));
    }
  }
  const heads = names.map((text) => element("th", "", text));
  if (count) parts.push(element("table", "", element("thead", "", element("tr", "", ...heads)), body));
  else parts.push(element("p", "muted", "No node of this stage serves a site, or none that the filters show."));
  container.replaceChildren(...parts);
}
