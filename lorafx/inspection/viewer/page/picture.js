// The picture of a stage: a box for each layer, which a click opens. dagre says where everything
// lies, cytoscape draws it.
"use strict";

const NODE = { width: 176, height: 40 };
const BOX = { width: 320, height: 52 }; // closed
const LETTER = 6.5; // the width of one
const WHOLE = 60; // nodes of a graph that is opened as a whole
const COLORS = { site: "#cfe3ff", pack: "#e5d5ff", refused: "#ffd0cc", input: "#dfe5ec" };
const STYLE = [
  {
    selector: "node",
    style: {
      shape: "round-rectangle", ...NODE, "background-color": "#f4f6f9", "border-width": 1,
      "border-color": "#8796a8", label: "data(label)", color: "#16202c", "font-size": 12,
      "text-wrap": "wrap", "text-max-width": NODE.width, "text-valign": "center", "min-zoomed-font-size": 6,
    },
  },
  ...Object.entries(COLORS).map(([kind, color]) => ({ selector: `.${kind}`, style: { "background-color": color } })),
  { selector: ".closed", style: { ...BOX, "text-max-width": BOX.width } },
  { selector: ".open", style: { "background-opacity": 0.15, "text-valign": "top", color: "#7a8898" } },
  { selector: ".changed", style: { "underlay-color": "#d98600", "underlay-opacity": 0.6, "underlay-padding": 4 } },
  { selector: "edge", style: { width: 1, "line-color": "#8796a8", "target-arrow-color": "#8796a8", "target-arrow-shape": "vee", "curve-style": "bezier" } },
  { selector: ".reads", style: { width: 3, "line-color": "#0a8a5a" } },
  { selector: ".users", style: { width: 3, "line-color": "#c2410c" } },
  { selector: ".faded", style: { opacity: 0.25 } },
  { selector: ".picked", style: { "border-color": "#1558d6", "border-width": 4 } },
];

/** A line that fits into a box; the panel of the node has all of it. */
function cut(line, { width }) {
  const most = Math.floor(width / LETTER);
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}

class Picture {
  /** `picked(entry)` is called with the entry that was clicked, or null. */
  constructor(container, picked) {
    this.cy = cytoscape({ container, minZoom: 0.02, maxZoom: 3, autoungrabify: true, style: STYLE });
    this.cy.on("tap", ({ target }) => {
      const { entry, box } = target === this.cy ? {} : target.scratch();
      if (box === undefined) picked(entry || null);
      else this.toggle(box);
    });
    new ResizeObserver(() => this.cy.resize()).observe(container);
  }

  /** Show a stage; of a large one the first layer with sites is open. */
  show(stage) {
    this.stage = stage;
    const shown = stage.entries.filter((entry) => entry.box !== null);
    const isCall = (entry) => entry.node.operator === "invoke_subgraph"; // of a body, where the sites are
    const first = shown.find((entry) => entry.sites.length && !isCall(entry)) || shown[0];
    this.open = new Set((shown.length > WHOLE ? [first] : shown).map((entry) => entry.box));
    this.draw();
    if (first) this.reveal(first);
  }

  /** The id of what stands for an entry: its node, or its closed box. */
  idOf({ key, box }) {
    if (box === null) return null;
    return this.open.has(box) ? key : `box ${box}`;
  }

  draw() {
    const nodes = new Map();
    const edges = new Map();
    const add = (id, data, classes, scratch) => nodes.set(id, { group: "nodes", data: { id, ...data }, classes, scratch });
    this.stage.boxes.forEach((label, box) => {
      const inside = this.stage.entries.filter((entry) => entry.box === box);
      const open = this.open.has(box);
      const kind = open ? "" : ["refused", "pack", "site"].find((mark) => inside.some((entry) => entry.mark === mark));
      add(`box ${box}`, { label: open ? label : `${cut(label, BOX)}\n${inside.length} nodes` }, ["box", open ? "open" : "closed", kind], { box });
      for (const entry of open ? inside : []) {
        const { name, operator, value, kind: input } = entry.node;
        const classes = [entry.mark || (input && "input"), entry.changed && "changed"];
        add(entry.key, { parent: `box ${box}`, label: `${cut(name, NODE)}\n${cut(`${operator} ${value}`, NODE)}` }, classes, { entry });
      }
    });
    for (const entry of this.stage.entries) {
      for (const input of entry.inputs) {
        const [source, target] = [this.idOf(input), this.idOf(entry)];
        const data = { source, target, boxes: input.box === entry.box ? "" : `${input.box} ${entry.box}` };
        if (source && target && source !== target) edges.set(`${source} ${target}`, { data });
      }
    }
    this.place(nodes, edges);
    this.cy.elements().remove();
    this.cy.add([...nodes.values(), ...edges.values()]);
    this.mark();
  }

  place(nodes, edges) {
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ nodesep: 14, ranksep: 26, ranker: "tight-tree" });
    for (const [id, { data, classes }] of nodes) {
      graph.setNode(id, { ...(classes.includes("closed") ? BOX : NODE) });
      if (data.parent) graph.setParent(id, data.parent);
    }
    const seen = new Set(); // pairs of boxes: of all edges between two, one has to do, or it takes seconds
    for (const { data: { source, target, boxes } } of edges.values()) {
      if (!seen.has(boxes)) graph.setEdge(source, target, {});
      if (boxes) seen.add(boxes);
    }
    dagre.layout(graph);
    for (const [id, node] of nodes) node.position = { x: graph.node(id).x, y: graph.node(id).y };
  }

  /** Open or close a box, which stays where it is on the screen. */
  toggle(box) {
    const place = () => this.cy.$id(`box ${box}`).renderedPosition();
    const before = place();
    if (!this.open.delete(box)) this.open.add(box);
    this.draw();
    this.cy.panBy({ x: before.x - place().x, y: before.y - place().y });
  }

  /** Mark the entry that is picked, with what it reads and who reads it, and fade all but `found`. */
  mark(picked = this.picked, found = this.found) {
    Object.assign(this, { picked, found });
    const seen = new Set((found || this.stage.entries).map((entry) => this.idOf(entry)));
    this.cy.elements().removeClass("picked reads users");
    this.cy.nodes().forEach((node) => { node.toggleClass("faded", !node.hasClass("open") && !seen.has(node.id())); });
    const node = this.cy.$id((picked && this.idOf(picked)) || "");
    node.addClass("picked");
    node.incomers("edge").addClass("reads");
    node.outgoers("edge").addClass("users");
  }

  /** Bring an entry into the middle, its box opened. */
  reveal(entry) {
    if (entry.box === null) return;
    if (!this.open.has(entry.box)) this.toggle(entry.box);
    this.cy.zoom(Math.max(this.cy.zoom(), 0.8));
    this.cy.center(this.cy.$id(entry.key));
  }
}
