// A group for each layer of the model, laid out by dagre when it is opened.
"use strict";

const NODE = { width: 176, height: 40 };
const BOX = { width: 320, height: 52, gap: 70 }; // of a closed group, and between two
const MOST = 220; // nodes of a group: dagre takes a tenth of a second for so many
const STATE = new Set(["weight", "bank", "state", "packed", "symbol"]);

/** The layer that a module belongs to: its path up to the first number. */
function layerOf(path) {
  const parts = path.split(".");
  const end = parts.findIndex((part) => /^\d+$/.test(part));
  return end < 0 ? "" : parts.slice(0, end + 1).join(".");
}

/** What is shown on demand only: parameters, banks, sizes. */
function isState(entry) {
  const { node } = entry;
  if (node.value.startsWith("Sym(")) return true;
  return node.op === "get_attr" || (node.op === "placeholder" && (STATE.has(node.kind) || !node.kind));
}

/** Groups in the order of the program: layers, and runs of what belongs to none. A size that a pass
 * has put before all layers does not put its layer there: the mean of a group's places counts. */
function groupsOf(stage, withState) {
  const found = [];
  stage.names.forEach((body, part) => {
    const byLayer = new Map();
    const inputs = { key: `${part}/inputs`, label: "inputs", part, entries: [] };
    let last = null;
    let runs = 0;
    const groups = [];
    const state = [];
    for (const entry of stage.entries) {
      if (entry.part !== part) continue;
      if (isState(entry)) {
        state.push(entry);
        continue;
      }
      if (entry.node.op === "placeholder") {
        inputs.entries.push(entry);
        continue;
      }
      const layer = entry.node.path ? layerOf(entry.node.path) : null;
      if (layer === null && last) {
        last.entries.push(entry); // what a pass has put there
      } else if (layer) {
        if (!byLayer.has(layer)) {
          byLayer.set(layer, { key: `${part}/${layer}`, label: layer, part, entries: [] });
          groups.push(byLayer.get(layer));
        }
        last = byLayer.get(layer);
        last.entries.push(entry);
      } else {
        if (!last || !last.run) {
          last = { key: `${part}/run${runs++}`, label: "", part, entries: [], run: true };
          groups.push(last);
        }
        last.entries.push(entry);
      }
    }
    for (const group of groups) if (group.run) group.label = runLabel(group.entries);
    const mean = new Map(groups.map((group) =>
      [group, group.entries.reduce((sum, entry) => sum + entry.index, 0) / group.entries.length]));
    groups.sort((a, b) => mean.get(a) - mean.get(b));
    const all = inputs.entries.length ? [inputs, ...groups] : groups;
    if (withState) placeState(state, all, inputs);
    found.push(...all.flatMap(pieces));
  });
  return found;
}

/** Parameters stand with their only readers, others with the inputs. */
function placeState(state, groups, inputs) {
  const home = new Map(groups.flatMap((group) => group.entries.map((entry) => [entry, group])));
  const first = new Map();
  for (const entry of state) {
    const homes = new Set(entry.users.map((user) => home.get(user)).filter(Boolean));
    const made = entry.node.op !== "placeholder" && entry.node.op !== "get_attr";
    const group = homes.size === 1 || made ? [...homes][0] || groups[0] : inputs;
    if (!first.has(group)) first.set(group, []);
    first.get(group).push(entry);
  }
  if (first.has(inputs) && !groups.includes(inputs)) groups.unshift(inputs);
  for (const [group, entries] of first) if (group) group.entries.unshift(...entries);
}

function runLabel(entries) {
  const paths = [...new Set(entries.map((entry) => entry.node.path).filter(Boolean))];
  return paths.length > 2 ? `${paths[0]} … ${paths[paths.length - 1]}` : paths.join(", ") || "forward";
}

function pieces(group) {
  const count = Math.ceil(group.entries.length / MOST);
  if (count < 2) return [group];
  const size = Math.ceil(group.entries.length / count);
  return Array.from({ length: count }, (_, i) => ({
    ...group,
    key: `${group.key}#${i}`,
    label: `${group.label}, part ${i + 1} of ${count}`,
    entries: group.entries.slice(i * size, (i + 1) * size),
  }));
}

/** A node's name without that of its layer, which stands above it. */
function shortName(entry, group) {
  const layer = group.label.split(".").slice(-2).join("_");
  const { name } = entry.node;
  return layer && name.startsWith(`${layer}_`) ? name.slice(layer.length + 1) : name;
}

const layouts = new Map(); // by shape: equal layers are laid out once

/** The middles of a group's nodes, from (0, 0). */
function layoutOf(group) {
  const index = new Map(group.entries.map((entry, i) => [entry, i]));
  const edges = [];
  group.entries.forEach((entry, to) => {
    for (const input of new Set(entry.inputs)) {
      if (index.has(input)) edges.push([index.get(input), to]);
    }
  });
  const key = `${group.entries.length}:${edges.join(" ")}`;
  if (!layouts.has(key)) layouts.set(key, laidOut(group.entries.length, edges));
  return layouts.get(key);
}

function laidOut(count, edges) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 26, edgesep: 8, ranker: "tight-tree" });
  graph.setDefaultEdgeLabel(() => ({}));
  for (let i = 0; i < count; i++) graph.setNode(String(i), { ...NODE });
  for (const [from, to] of edges) graph.setEdge(String(from), String(to));
  dagre.layout(graph);
  const { width, height } = graph.graph();
  return {
    width,
    height,
    places: Array.from({ length: count }, (_, i) => graph.node(String(i))),
  };
}
