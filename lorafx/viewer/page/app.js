// The page: which graph, stage and tab are shown, search, filters, light and dark.
"use strict";

const byId = (id) => document.getElementById(id);
const OF_STAGES = ["graph", "diff", "nodes", "sites"];
const TABS = [...OF_STAGES, "model", "files"];
const LETTER = 7.3; // pixels of a letter in the diff
const FILTERS = { sites: "Sites", packs: "Packs", refused: "Refused", changed: "Changed" };

class Viewer {
  constructor() {
    this.graphs = [...document.querySelectorAll("script.graph")];
    this.loaded = new Map();
    this.state = { graph: 0, stage: 0, tab: "graph", withState: false };
    this.filters = new Set();
    this.unfolded = new Set();
    this.scene = new Scene(byId("canvas"), (entry) => this.pick(entry));
    this.nodeList = new VirtualList(byId("node-list"), 28, (index) => this.nodeRow(index));
    this.diffList = new VirtualList(byId("diff-list"), 22, (index) => this.diffRow(index));
    this.listen();
    this.scene.readColors();
  }

  async start() {
    this.about = await unpacked(byId("about"));
    drawModel(byId("view-model"), this.about.passes);
    byId("graph").replaceChildren(...this.about.graphs.map((title, i) => new Option(title, i)));
    const wanted = new URLSearchParams(location.hash.slice(1));
    const number = Number(wanted.get("graph"));
    const lora = this.about.graphs.findIndex((title) => title.includes(" lora"));
    if (!this.graphs.length) return this.showNothing();
    await this.showGraph(wanted.has("graph") && this.graphs[number] ? number : Math.max(lora, 0), wanted);
    document.documentElement.dataset.ready = "true";
  }

  showNothing() {
    byId("timeline").textContent = "No graph has been compiled yet.";
    document.documentElement.dataset.ready = "true";
  }

  // --- graph, stage, tab ---

  async showGraph(number, wanted = new URLSearchParams()) {
    if (!this.loaded.has(number)) {
      this.loaded.set(number, new Graph(await unpacked(this.graphs[number])));
    }
    this.graph = this.loaded.get(number);
    this.state.graph = number;
    byId("graph").value = String(number);
    const names = this.graph.stages.map((stage) => stage.name);
    for (const id of ["diff-from", "diff-to"]) {
      byId(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
    }
    const files = { ...this.about.texts, ...this.graph.sources };
    if (this.graph.facts.length) files["about the graph"] = this.graph.facts.join("\n");
    this.files = files;
    byId("file").replaceChildren(...Object.keys(files).map((name) => new Option(name, name)));
    byId("file-text").textContent = Object.values(files)[0] || "Nothing was generated for this graph.";
    const stage = names.indexOf(wanted.get("stage"));
    this.unfolded.clear();
    this.selected = null;
    this.showStage(stage < 0 ? names.length - 1 : stage, { keepPlace: false });
    const tab = TABS.includes(wanted.get("tab")) ? wanted.get("tab") : this.state.tab;
    this.showTab(this.stage ? tab : "files");
    const entry = wanted.get("node") && this.stage && this.stage.byKey.get(wanted.get("node"));
    if (entry) this.pick(entry, true);
    else if (this.stage) this.revealSite();
  }

  /** Begin where LoRA is, not at whatever the graph begins with: in a layer's body, not its call. */
  revealSite() {
    const calls = (entry) => shortTarget(entry.node) === "invoke_subgraph";
    const site = this.stage.entries.find((entry) => entry.sites.length && !calls(entry));
    if (site) this.scene.reveal(site);
  }

  showStage(index, { keepPlace = true } = {}) {
    this.noStages(!this.graph.stages.length);
    if (!this.graph.stages.length) return;
    const key = this.selected && this.selected.key;
    this.state.stage = index;
    this.stage = this.graph.stage(index);
    drawTimeline(
      byId("timeline"), this.graph, index, (chosen) => this.chooseStage(chosen), this.about.passes, (chosen) => this.showModel(chosen),
    );
    byId("diff-from").value = String(Math.max(0, index - 1));
    byId("diff-to").value = String(index);
    this.drawFilters();
    this.scene.show(this.stage, this.state.withState, { keepPlace });
    this.pick((key && this.stage.byKey.get(key)) || null);
    this.refresh();
  }

  chooseStage(index) {
    if (this.state.tab === "model") this.showTab("graph");
    this.showStage(index);
  }

  /** What a pass over the model did. */
  showModel(index) {
    this.showTab("model");
    byId("view-model").children[index].scrollIntoView();
  }

  /** A graph without stages has files. */
  noStages(none) {
    for (const name of OF_STAGES) document.querySelector(`[data-tab=${name}]`).disabled = none;
    if (!none) return;
    this.stage = null;
    byId("details").hidden = true;
    byId("filters").replaceChildren();
    byId("hits").textContent = "";
    byId("timeline").textContent = "No stages: an earlier process compiled this graph, or the call that captured it cannot be made again.";
    this.state.tab = "files";
  }

  showTab(tab) {
    this.state.tab = tab;
    for (const name of TABS) {
      byId(`view-${name}`).hidden = name !== tab;
      const button = document.querySelector(`[data-tab=${name}]`);
      button.setAttribute("aria-selected", String(name === tab));
    }
    byId("filters").hidden = !["graph", "nodes", "sites"].includes(tab);
    this.refresh();
  }

  remember() {
    const { graph, stage, tab } = this.state;
    const parts = { graph, stage: this.graph.stages[stage] && this.graph.stages[stage].name, tab };
    if (this.selected) parts.node = this.selected.key;
    try {
      history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
    } catch { /* a page inside another document */ }
  }

  // --- search and filters ---

  drawFilters() {
    const counts = Object.fromEntries(Object.keys(FILTERS).map((tag) =>
      [tag, this.stage.entries.filter((entry) => entry.tags[tag]).length]));
    byId("filters").replaceChildren(...Object.entries(FILTERS).map(([tag, word]) => {
      const button = element("button", `filter ${tag}`, element("i"), `${word} ${counts[tag]}`);
      button.type = "button";
      button.dataset.filter = tag;
      button.setAttribute("aria-pressed", String(this.filters.has(tag)));
      button.addEventListener("click", () => {
        if (!this.filters.delete(tag)) this.filters.add(tag);
        button.setAttribute("aria-pressed", String(this.filters.has(tag)));
        this.refresh();
      });
      return button;
    }));
  }

  get words() {
    return byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  }

  refresh() {
    if (!this.stage) return;
    const { words } = this;
    const tagged = (entry) => !this.filters.size || [...this.filters].some((tag) => entry.tags[tag]);
    this.found = this.stage.entries.filter((entry) => tagged(entry) && matches(entry, words));
    const all = !words.length && !this.filters.size;
    const set = new Set(this.found);
    const count = this.found.length;
    byId("hits").textContent = words.length ? `${count} hit${count === 1 ? "" : "s"}` : "";
    this.scene.filter(all ? null : (entry) => set.has(entry));
    if (this.state.tab === "nodes") this.nodeList.show(this.found.length);
    if (this.state.tab === "sites") drawSites(byId("view-sites"), this.stage, this.about.measured, (entry) => set.has(entry), (entry) => this.pick(entry, true));
    if (this.state.tab === "diff") this.showDiff();
    this.remember();
  }

  /** The next hit of the search, or the one before. */
  step(by) {
    if (!this.found || !this.found.length) return;
    const at = this.found.indexOf(this.selected);
    const next = at < 0 ? 0 : (at + by + this.found.length) % this.found.length;
    this.pick(this.found[next], true);
    byId("hits").textContent = `${next + 1} of ${this.found.length}`;
  }

  pick(entry, reveal = false) {
    this.selected = entry;
    this.scene.select(entry);
    drawDetails(byId("details"), entry, this.stage, this.about.measured, (other) => this.pick(other, true));
    if (entry && reveal) {
      if (!this.scene.home.has(entry) && !this.state.withState) this.toggleState();
      this.scene.reveal(entry);
      if (this.state.tab === "nodes") this.nodeList.reveal(this.found.indexOf(entry));
    }
    if (this.state.tab === "nodes") this.nodeList.render();
    this.remember();
  }

  // --- lists ---

  nodeRow(index) {
    const entry = this.found[index];
    const { node, tags } = entry;
    const kind = ["refused", "packs", "sites"].find((tag) => tags[tag]) || "";
    const row = element(
      "button", `node ${kind}${tags.changed ? " changed" : ""}`,
      element("i"), element("b", "", node.name), element("span", "", shortTarget(node)),
      element("span", "value", node.value), element("span", "path", node.path),
    );
    row.type = "button";
    row.setAttribute("aria-current", String(entry === this.selected));
    row.addEventListener("click", () => this.pick(entry));
    return row;
  }

  showDiff({ keepPlace = false } = {}) {
    const [from, to] = ["diff-from", "diff-to"].map((id) => Number(byId(id).value));
    const rows = diffRows(this.graph.stage(from), this.graph.stage(to));
    const { removed, added, changed, moved } = diffCounts(rows);
    const outlined = moved ? `, ${moved} moved` : "";
    byId("diff-counts").textContent = `${removed} removed, ${added} added, ${changed} changed${outlined}`;
    const { words } = this;
    const wanted = (row) => [row.a, row.b].some((entry) => entry && matches(entry, words));
    const shown = words.length ? rows.filter(wanted) : folded(rows, this.unfolded);
    this.diffRows = shown;
    if (!shown.some((row) => row.kind !== "head")) this.diffRows = [{ kind: "fold", text: "nothing to show" }];
    const longest = Math.max(0, ...this.diffRows.map((row) =>
      Math.max(row.a ? row.a.node.line.length : 0, row.b ? row.b.node.line.length : 0)));
    const room = byId("diff-list").clientWidth / 2 - 24;
    const wider = Math.max(0, Math.min(longest, 1000) * LETTER - room);
    this.diffList.show(this.diffRows.length, { keepPlace, wider });
  }

  diffRow(index) {
    const row = this.diffRows[index];
    if (row.kind === "head") return element("div", "diff head", row.text);
    if (row.kind === "fold") {
      const fold = element("button", "diff fold", row.text);
      fold.type = "button";
      fold.addEventListener("click", () => {
        this.unfolded.add(row.key);
        this.showDiff({ keepPlace: true });
      });
      return fold;
    }
    const side = (entry, other, kind) => {
      const made = element("div", `side ${entry ? kind : "none"}`, lineElement(entry, other));
      if (entry) made.title = entry.node.path || entry.node.name;
      return made;
    };
    const changed = row.kind === "changed";
    const left = { changed: "removed", replaced: "removed" }[row.kind] || row.kind;
    const right = { changed: "added", replaced: "added" }[row.kind] || row.kind;
    return element("div", "diff two", side(row.a, changed && row.b, left), side(row.b, changed && row.a, right));
  }

  // --- controls ---

  listen() {
    byId("graph").addEventListener("change", (event) => this.showGraph(Number(event.target.value)));
    byId("search").addEventListener("input", () => this.refresh());
    byId("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.step(event.shiftKey ? -1 : 1);
    });
    for (const button of document.querySelectorAll("[data-tab]")) {
      button.addEventListener("click", () => this.showTab(button.dataset.tab));
    }
    for (const id of ["diff-from", "diff-to"]) byId(id).addEventListener("change", () => this.showDiff());
    byId("file").addEventListener("change", (event) => {
      byId("file-text").textContent = this.files[event.target.value];
    });
    byId("zoom-in").addEventListener("click", () => this.scene.zoom(1.3));
    byId("zoom-out").addEventListener("click", () => this.scene.zoom(1 / 1.3));
    byId("fit").addEventListener("click", () => this.scene.fit());
    byId("state").addEventListener("click", () => this.toggleState());
    byId("expand").addEventListener("click", (event) => {
      const open = event.target.textContent === "Open all";
      event.target.textContent = open ? "Close all" : "Open all";
      if (open) this.scene.openAll();
      else this.scene.closeAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.scene.readColors());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const { stage } = this.state;
    if (event.key === "/") {
      byId("search").focus();
      event.preventDefault();
    } else if (event.key === "Escape") this.pick(null);
    else if (event.key === "ArrowLeft" && stage > 0) this.showStage(stage - 1);
    else if (event.key === "ArrowRight" && this.graph && stage < this.graph.stages.length - 1) this.showStage(stage + 1);
  }

  toggleState() {
    this.state.withState = !this.state.withState;
    byId("state").setAttribute("aria-pressed", String(this.state.withState));
    this.scene.show(this.stage, this.state.withState, { keepPlace: true });
  }
}

const viewer = new Viewer();
viewer.start();
