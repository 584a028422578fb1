// The page: graphs as lorafx/inspection/viewer/dump.py has written them, their stages, search, and
// the panel of a node.
"use strict";

const byId = (id) => document.getElementById(id);
const tabs = () => [...document.querySelectorAll("[data-tab]")];
const FILTERS = {
  all: () => true,
  sites: (entry) => entry.sites.length > 0,
  packs: (entry) => entry.mark === "pack",
  refused: (entry) => entry.mark === "refused",
  changed: (entry) => entry.changed,
};
const CHANGES = { "-": "removed", "+": "added" };

async function unpacked({ textContent }) {
  const bytes = Uint8Array.from(atob(textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** An element with text or children. Text is never read as HTML. */
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that calls `clicked`. */
function button(className, clicked, ...children) {
  return element("button", { type: "button", className, onclick: clicked }, ...children);
}

function options(select, names) {
  select.replaceChildren(...names.map((name, index) => new Option(name, index)));
}

/** A stage with entries: nodes with what is known of them at this stage. */
function stageOf(graph, data) {
  const byKey = new Map();
  const entries = data.nodes.map(([number, body, box, mark, changed]) => {
    const node = graph.nodes[number];
    const sites = node.sites.map(Object.fromEntries);
    const entry = { node, key: `${body}/${node.name}`, body, box, mark, changed, sites, users: [] };
    const facts = node.facts.map(([, text]) => text);
    entry.text = [node.name, ...facts, ...sites.map((site) => site.Site)].join("\n").toLowerCase();
    byKey.set(entry.key, entry);
    return entry;
  });
  for (const entry of entries) {
    entry.inputs = entry.node.inputs.map((name) => byKey.get(`${entry.body}/${name}`)).filter(Boolean);
    for (const input of entry.inputs) input.users.push(entry);
  }
  return { ...data, entries, byKey };
}

class Viewer {
  constructor() {
    this.graphs = [...document.querySelectorAll("script.graph")];
    this.picture = new Picture(byId("picture"), (entry) => this.pick(entry));
    this.listen();
  }

  async start() {
    this.about = await unpacked(byId("about"));
    options(byId("graph"), this.about.graphs);
    const wanted = new URLSearchParams(location.hash.slice(1));
    const first = this.about.graphs.findIndex((title) => title.includes(" lora"));
    if (this.graphs.length) await this.showGraph(Number(wanted.get("graph") || Math.max(first, 0)), wanted);
    else byId("seconds").textContent = "No graph has been compiled yet.";
    document.documentElement.dataset.ready = "true";
  }

  async showGraph(number, wanted = new URLSearchParams()) {
    this.graph = await unpacked(this.graphs[number] || this.graphs[0]);
    byId("graph").value = number;
    const { seconds, stages, sources, facts } = this.graph;
    const times = Object.entries(seconds).map(([name, value]) => `${name} ${value.toFixed(2)} s`);
    byId("seconds").textContent = times.join(" · ");
    this.files = Object.entries({ ...this.about.texts, ...sources });
    if (facts.length) this.files.push(["about the graph", facts.join("\n")]);
    options(byId("file"), this.files.map(([name]) => name));
    byId("file").onchange();
    const names = stages.map(({ name }) => name);
    byId("stages").replaceChildren(...stages.map((stage, at) => {
      const made = button(stage.idle ? "idle" : "", () => this.showStage(at), element("b", { textContent: stage.name }));
      made.append(element("span", {}, stage.did), element("span", {}, stage.time));
      made.dataset.pass = stage.name;
      return made;
    }));
    for (const tab of tabs()) tab.disabled = !stages.length && !["model", "files"].includes(tab.dataset.tab);
    this.tab = stages.length ? wanted.get("tab") || this.tab || "graph" : "files";
    const at = names.indexOf(wanted.get("stage"));
    if (stages.length) {
      const last = stages.findLastIndex((stage) => !stage.idle); // of those that changed something
      this.showStage(at < 0 ? Math.max(last, 0) : at, wanted.get("node"));
      return;
    }
    this.stage = null;
    byId("stages").textContent = "No stages: an earlier process compiled this graph, or the call that captured it cannot be made again.";
    this.showTab("files");
  }

  showStage(index, key = this.picked?.key) {
    this.at = index;
    this.stage = stageOf(this.graph, this.graph.stages[index]);
    [...byId("stages").children].forEach((each, at) => each.setAttribute("aria-current", at === index));
    byId("stages").children[index].scrollIntoView({ block: "nearest" });
    byId("diff").replaceChildren(...this.stage.diff.split("\n").map((line) => element("div", { className: CHANGES[line[0]] || "" }, line)));
    const kept = byId("filter").selectedIndex;
    options(byId("filter"), Object.entries(FILTERS).map(([name, test]) => `${name}: ${this.stage.entries.filter(test).length}`));
    byId("filter").selectedIndex = Math.max(kept, 0);
    this.rows = new Map(this.stage.entries.map((entry) => [entry, this.rowOf(entry)]));
    byId("view-nodes").replaceChildren(...this.rows.values());
    this.picture.show(this.stage);
    this.showTab(this.tab === "model" ? "graph" : this.tab);
    const entry = this.stage.byKey.get(key);
    this.pick(entry || null, Boolean(entry));
  }

  showTab(name) {
    this.tab = name;
    for (const tab of tabs()) {
      tab.setAttribute("aria-selected", tab.dataset.tab === name);
      byId(`view-${tab.dataset.tab}`).hidden = tab.dataset.tab !== name;
    }
    this.refresh();
  }

  /** Show what the search and the filter let through. */
  refresh() {
    if (!this.stage) return;
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const test = Object.values(FILTERS)[byId("filter").selectedIndex];
    this.found = this.stage.entries.filter((entry) => test(entry) && words.every((word) => entry.text.includes(word)));
    const found = new Set(this.found);
    for (const [entry, row] of this.rows) row.hidden = !found.has(entry);
    byId("hits").textContent = words.length ? `${found.size} hits` : "";
    this.picture.mark(this.picked, this.found);
    if (this.tab === "sites") this.showSites();
    this.remember();
  }

  /** The next hit of the search, or the one before. */
  step(by) {
    const { length } = this.found;
    if (!length) return;
    const at = this.found.indexOf(this.picked);
    const next = at < 0 ? 0 : (at + by + length) % length;
    this.pick(this.found[next], true);
    byId("hits").textContent = `${next + 1} of ${length}`;
  }

  pick(entry, reveal = false) {
    for (const [each, row] of this.rows) row.setAttribute("aria-current", each === entry);
    this.picked = entry;
    this.picture.mark(entry);
    byId("details").hidden = !entry;
    if (entry) this.showDetails(entry);
    if (entry && reveal) {
      this.picture.reveal(entry);
      this.rows.get(entry).scrollIntoView({ block: "nearest" });
    }
    this.remember();
  }

  /** The address holds what is shown. */
  remember() {
    const parts = { graph: byId("graph").value, stage: this.stage?.name, tab: this.tab };
    if (this.picked) parts.node = this.picked.key;
    history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
  }

  rowOf(entry) {
    const { name, operator, value, path } = entry.node;
    const texts = [operator, value, path].map((text) => element("span", {}, text));
    return button(`node ${entry.mark} ${entry.changed ? "changed" : ""}`, () => this.pick(entry), element("b", {}, name), ...texts);
  }

  showDetails(entry) {
    const paths = [entry.node.path, ...entry.sites.map((site) => site.Site)];
    const refusals = this.stage.refusals.filter((refusal) => refusal.paths.some((path) => paths.includes(path)));
    const facts = [...entry.node.facts, ...refusals.map(({ when, reason }) => [`Refused, ${when}`, reason])];
    for (const word of Object.keys(entry.sites[0] || {})) {
      facts.push([word, [...new Set(entry.sites.map((site) => site[word]))].join("\n")]);
    }
    if (entry.changed) facts.push(["Changed", `by ${this.stage.name}`]);
    const links = (heading, entries) => element("details", { open: entries.length < 20 }, element("summary", {}, `${heading} ${entries.length}`), element("ul", {},
      ...entries.map((other) => element("li", {}, button("link", () => this.pick(other, true), `${other.node.name} ${other.node.value}`)))));
    byId("details").replaceChildren(
      button("close", () => this.pick(null), "×"), element("h3", {}, entry.node.name),
      element("dl", {}, ...facts.flatMap(([word, text]) => [element("dt", {}, word), element("dd", {}, text)])),
      links("Reads", entry.inputs), links("Read by", entry.users),
    );
  }

  /** Refusals, then what became of each site. */
  showSites() {
    const found = this.found.flatMap((entry) => entry.sites.map((site) => ({ ...site, entry })));
    const words = Object.keys(found[0] || {}).filter((word) => word !== "entry");
    const rows = found.map((site) => element("tr", {},
      ...words.map((word) => element("td", {}, site[word])),
      element("td", {}, button("link", () => this.pick(site.entry, true), site.entry.node.name))));
    byId("view-sites").replaceChildren(
      ...this.stage.refusals.map(({ paths, when, reason }) =>
        element("p", { className: "refused" }, `Refused (${when}): ${paths.join(", ")}: ${reason}`)),
      element("table", {}, element("tr", {}, ...[...words, "Node"].map((word) => element("th", {}, word))), ...rows),
    );
  }

  listen() {
    byId("graph").onchange = ({ target }) => this.showGraph(Number(target.value));
    byId("search").oninput = byId("filter").onchange = () => this.refresh();
    byId("search").onkeydown = ({ key, shiftKey }) => key === "Enter" && this.step(shiftKey ? -1 : 1);
    for (const tab of tabs()) tab.onclick = () => this.showTab(tab.dataset.tab);
    for (const pass of document.querySelectorAll(".of-model")) {
      pass.onclick = () => {
        this.showTab("model");
        document.querySelector(`h3[data-pass="${CSS.escape(pass.dataset.pass)}"]`).scrollIntoView();
      };
    }
    byId("file").onchange = () => { byId("file-text").textContent = this.files[byId("file").value]?.[1] || ""; };
    byId("fit").onclick = () => this.picture.cy.fit();
    document.addEventListener("keydown", ({ key, target }) => {
      if (!this.stage || target.closest("input, select")) return;
      const at = this.at + { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (key === "Escape") this.pick(null);
      else if (this.graph.stages[at]) this.showStage(at);
    });
  }
}

const viewer = new Viewer();
viewer.start();
