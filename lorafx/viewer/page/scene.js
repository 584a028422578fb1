// The picture of a graph: a box for each layer, which a click opens. dagre says where the nodes of
// a box lie, cytoscape draws them.
"use strict";

const SMALL = 400; // nodes of a graph that is opened as a whole
const COLORS = [
  "canvas", "group", "group-line", "node", "node-line", "text", "muted", "edge", "accent", "sites",
  "sites-line", "packs", "packs-line", "refused", "refused-line", "input", "changed", "reads",
  "users",
];

class Scene {
  /** `picked(entry)` is called with the entry that was clicked, or null. */
  constructor(container, picked) {
    this.picked = picked;
    this.open = new Set(); // keys of groups
    this.groups = [];
    this.home = new Map(); // the group of each entry
    this.revealed = null; // the entry that stays in the middle, until somebody looks elsewhere
    this.shown = () => true;
    this.cy = cytoscape({
      container, minZoom: 0.01, maxZoom: 3, autoungrabify: true, layout: { name: "preset" },
    });
    this.cy.on("tap", (event) => this.tapped(event.target));
    this.cy.on("dragpan scrollzoom pinchzoom", () => { this.revealed = null; });
    new ResizeObserver(() => this.resize()).observe(container);
  }

  // --- what is shown ---

  show(stage, withState, { keepPlace = false } = {}) {
    this.stage = stage;
    this.revealed = null;
    this.groups = groupsOf(stage, withState);
    this.home = new Map(this.groups.flatMap((group) => group.entries.map((entry) => [entry, group])));
    if (!keepPlace) {
      this.open.clear();
      const first = this.groups.find((group) => countsOf(group).sites) || this.groups[0];
      const small = this.home.size <= SMALL;
      for (const group of small ? this.groups : first ? [first] : []) this.open.add(group.key);
    }
    this.draw();
    if (!keepPlace) this.toTop();
  }

  draw() {
    const elements = this.groups.flatMap((group) => this.boxOf(group));
    const edges = new Map();
    for (const entry of this.home.keys()) {
      for (const input of entry.inputs) {
        const [source, target] = [this.idOf(input), this.idOf(entry)];
        if (source && target && source !== target) edges.set(`${source}\n${target}`, { source, target });
      }
    }
    for (const data of edges.values()) elements.push({ group: "edges", data });
    this.place(elements);
    this.cy.batch(() => {
      this.cy.elements().remove();
      this.cy.add(elements);
    });
    this.filter(this.shown);
    this.select(this.selected);
  }

  /** What stands for an entry: its own node, or the box of its group where that is closed. */
  idOf(entry) {
    const group = this.home.get(entry);
    if (!group) return null;
    return this.open.has(group.key) ? entry.key : boxId(group);
  }

  boxOf(group) {
    const counts = countsOf(group);
    const open = this.open.has(group.key);
    const facts = [`${group.entries.length} nodes`];
    if (counts.sites) facts.push(`${counts.sites} site${counts.sites > 1 ? "s" : ""}`);
    if (counts.changed) facts.push(`${counts.changed} changed`);
    if (counts.kind === "refused") facts.push("refused");
    const label = open ? `▾ ${group.label}` : `▸ ${group.label}\n${facts.join(" · ")}`;
    const classes = ["box", open ? "open" : "closed", counts.kind];
    const box = { group: "nodes", data: { id: boxId(group), label }, scratch: { group }, classes };
    if (!open) return [box];
    return [box, ...group.entries.map((entry) => {
      const shape = entry.node.value.replace(/^(b?)float/, "$1f").replace(/^int/, "i");
      const input = entry.node.op === "placeholder" && "input";
      return {
        group: "nodes",
        data: {
          id: entry.key,
          parent: boxId(group),
          label: `${shortName(entry, group)}\n${shortTarget(entry.node)}  ${shape}`,
        },
        scratch: { entry },
        classes: ["node", input, kindOf(entry.tags), entry.tags.changed && "changed"],
      };
    })];
  }

  /** The graph's boxes below one another, and those of each body that it calls beside them. */
  place(elements) {
    const byId = new Map(elements.map((each) => [each.data.id, each]));
    const tops = [];
    for (const group of this.groups) {
      const { part } = group;
      const left = part * 1400;
      const top = tops[part] || 0;
      let height = BOX.height;
      if (this.open.has(group.key)) {
        const layout = layoutOf(group);
        ({ height } = layout);
        layout.places.forEach(({ x, y }, i) => {
          byId.get(group.entries[i].key).position = { x: left + x - layout.width / 2, y: top + y };
        });
      } else byId.get(boxId(group)).position = { x: left, y: top + height / 2 };
      tops[part] = top + height + BOX.gap;
    }
  }

  tapped(target) {
    if (target === this.cy) return this.picked(null);
    const { entry, group } = target.scratch();
    if (entry) this.picked(entry);
    else if (group) this.toggle(group);
  }

  /** Open or close a box, which stays where it is on the screen. */
  toggle(group) {
    const before = this.cy.$id(boxId(group)).renderedPosition();
    if (!this.open.delete(group.key)) this.open.add(group.key);
    this.draw();
    const after = this.cy.$id(boxId(group)).renderedPosition();
    this.cy.panBy({ x: before.x - after.x, y: before.y - after.y });
  }

  openAll() {
    this.groups.forEach((group) => this.open.add(group.key));
    this.draw();
  }

  closeAll() {
    this.open.clear();
    this.draw();
    this.toTop();
  }

  select(entry) {
    this.selected = entry;
    this.cy.elements().removeClass("selected reads users");
    const node = entry && this.home.has(entry) ? this.cy.$id(this.idOf(entry)) : this.cy.collection();
    node.addClass("selected");
    node.incomers("edge").addClass("reads");
    node.outgoers("edge").addClass("users");
  }

  /** Fade all that `shown` is false for. */
  filter(shown) {
    this.shown = shown || (() => true);
    this.cy.batch(() => this.cy.nodes().forEach((node) => {
      const { entry, group } = node.scratch();
      const seen = entry ? this.shown(entry) : group.entries.some(this.shown);
      node.toggleClass("faded", !seen);
    }));
  }

  // --- where one looks ---

  /** Bring an entry into the middle, its box opened. */
  reveal(entry) {
    const group = this.home.get(entry);
    if (!group) return;
    if (!this.open.has(group.key)) {
      this.open.add(group.key);
      this.draw();
    }
    this.revealed = entry;
    this.cy.zoom(Math.max(this.cy.zoom(), 0.8));
    this.cy.center(this.cy.$id(entry.key));
  }

  resize() {
    const first = !this.cy.width();
    this.cy.resize();
    if (this.revealed) this.reveal(this.revealed);
    else if (first) this.toTop();
  }

  /** The beginning of the graph, over the width of the view where it can be read so. */
  toTop() {
    if (!this.groups.length || !this.cy.width()) return;
    const box = this.cy.nodes().filter((node) => !node.id().includes("box 1/")).boundingBox();
    const zoom = Math.min(1, Math.max(0.5, this.cy.width() / (box.w + 32)));
    const x = this.cy.width() / 2 - zoom * (box.x1 + box.w / 2);
    this.cy.viewport({ zoom, pan: { x, y: 20 - zoom * box.y1 } });
  }

  fit() {
    this.cy.fit(undefined, 20);
  }

  zoom(factor) {
    const renderedPosition = { x: this.cy.width() / 2, y: this.cy.height() / 2 };
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition });
  }

  /** The colours of the style sheet, for the theme that is shown. */
  readColors() {
    const probe = document.body.appendChild(element("i"));
    const read = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    this.colors = Object.fromEntries(COLORS.map((name) => [name, read(name)]));
    probe.remove();
    this.cy.style(styleOf(this.colors, getComputedStyle(document.body).fontFamily));
  }
}

const boxId = (group) => `box ${group.key}`;

function kindOf(tags) {
  return ["refused", "packs", "sites"].find((tag) => tags[tag]) || null;
}

function countsOf(group) {
  const paths = group.entries.flatMap((entry) => entry.sites.map((site) => site.path));
  const has = (tag) => group.entries.some((entry) => entry.tags[tag]);
  return {
    sites: new Set(paths).size,
    changed: group.entries.filter((entry) => entry.tags.changed).length,
    kind: kindOf({ refused: has("refused"), packs: has("packs"), sites: has("sites") }),
  };
}

function styleOf(colors, family) {
  const text = {
    label: "data(label)", "font-family": family, "font-size": 12, color: colors.text,
    "text-wrap": "wrap", "text-valign": "center", "text-halign": "center", "min-zoomed-font-size": 6,
  };
  const kinds = ["sites", "packs", "refused"].map((kind) => ({
    selector: `.${kind}`,
    style: { "background-color": colors[kind], "border-color": colors[`${kind}-line`], "border-width": 2 },
  }));
  const line = (color, width) => ({ "line-color": color, "target-arrow-color": color, width });
  return [
    {
      selector: "node",
      style: {
        ...text, shape: "round-rectangle", "border-width": 1,
        width: NODE.width, height: NODE.height, "text-max-width": NODE.width - 8,
        "background-color": colors.node, "border-color": colors["node-line"],
      },
    },
    { selector: ".input", style: { "background-color": colors.input } },
    { selector: ".box", style: { "background-color": colors.group, "border-color": colors["group-line"] } },
    ...kinds,
    { selector: ".closed", style: { width: BOX.width, height: BOX.height, "text-max-width": BOX.width - 16 } },
    { selector: ".open", style: { "background-color": colors.group, "text-valign": "top", "text-max-width": 600, padding: 16 } },
    { selector: ".changed", style: { "underlay-color": colors.changed, "underlay-opacity": 0.6, "underlay-padding": 4 } },
    { selector: "edge", style: { ...line(colors.edge, 1), "curve-style": "bezier", "target-arrow-shape": "vee" } },
    { selector: "edge.reads", style: line(colors.reads, 2) },
    { selector: "edge.users", style: line(colors.users, 2) },
    { selector: ".faded", style: { opacity: 0.25 } },
    { selector: ".selected", style: { "border-color": colors.accent, "border-width": 3 } },
  ];
}
