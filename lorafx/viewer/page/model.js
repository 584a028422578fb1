// What lorafx/viewer/graph_data.py has written: graphs, their stages, the nodes of each stage.
"use strict";

async function unpacked(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

class Graph {
  constructor(data) {
    Object.assign(this, data);
    this.nodes.forEach((node, id) => { node.id = id; });
    this.made = new Map();
  }

  stage(index) {
    if (!this.made.has(index)) this.made.set(index, new Stage(this, index));
    return this.made.get(index);
  }
}

/** A graph after one pass. An entry is a node in one of its graphs, with what is known of it. */
class Stage {
  constructor(graph, index) {
    const { name, edits, seconds, graphs, sites, refusals } = graph.stages[index];
    Object.assign(this, { index, name, edits, seconds });
    this.refusals = refusals.map((number) => graph.refusals[number]);
    const served = new Map(sites.map(([node, found]) => [node, found.map((n) => graph.sites[n])]));
    const refused = new Set(this.refusals.flatMap((refusal) => refusal.paths));
    const before = index ? new Set(graph.stage(index - 1).entries.map((e) => e.node.id)) : null;
    this.entries = [];
    this.byKey = new Map();
    this.names = graphs.map(([graphName]) => graphName);
    graphs.forEach(([, ids], part) => {
      for (const id of ids) {
        const node = graph.nodes[id];
        const sites = served.get(id) || [];
        const key = `${part}/${node.name}`;
        const isRefused = refused.has(node.path) || sites.some((site) => refused.has(site.path));
        const tags = {
          refused: isRefused && node.op !== "placeholder",
          packs: sites.some((site) => site.form === "packed"),
          sites: sites.length > 0,
          changed: before !== null && !before.has(id),
        };
        const entry = { node, part, key, sites, tags, users: [], index: this.entries.length };
        this.entries.push(entry);
        this.byKey.set(key, entry);
      }
    });
    for (const entry of this.entries) {
      entry.inputs = entry.node.inputs
        .map((input) => this.byKey.get(`${entry.part}/${input}`))
        .filter(Boolean);
      for (const input of entry.inputs) input.users.push(entry);
    }
  }

  /** Why LoRA cannot be applied at what `entry` computes. */
  refusalsOf(entry) {
    const paths = new Set([entry.node.path, ...entry.sites.map((site) => site.path)]);
    return this.refusals.filter((refusal) => refusal.paths.some((path) => paths.has(path)));
  }
}

/** The operator without its library: "mm" for torch.ops.aten.mm.default. */
function shortTarget(node) {
  if (node.op === "placeholder") return node.kind || "input";
  if (node.op === "output") return "output";
  const found = /torch\.ops\.(?:higher_order\.)?(?:(\w+)\.)?(\w+)/.exec(node.target);
  if (!found) return node.target.split(".").pop();
  return found[1] && found[1] !== "aten" ? `${found[1]}.${found[2]}` : found[2];
}

function matches(entry, words) {
  const { node, sites } = entry;
  const texts = [node.name, node.target, node.path, node.cls, node.source, node.code, node.value];
  const text = texts.concat(sites.map((site) => site.path)).join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

/** An element with classes, text or children. Text is never read as HTML. */
function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const bytesText = (bytes) => unitText(bytes, ["bytes", "kB", "MB", "GB", "TB"]);
const flopsText = (flops) => unitText(flops, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"]);

function unitText(number, units) {
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit++) number /= 1000;
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

function secondsText(seconds) {
  return seconds < 1 ? `${(seconds * 1e3).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
}
