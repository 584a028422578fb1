// What changed between two stages. Lines that both have are the longest run of names in the same
// order (a patience diff): n log n for n nodes. Between those, nodes are matched by what they compute
// and where. Layers that became calls of one body are shown as moved into it.
"use strict";

const CONTEXT = 3;

/** Indices of a longest increasing run of `numbers`. */
function longestIncreasing(numbers) {
  const ends = []; // index of the least end of a run of each length
  const before = new Array(numbers.length);
  numbers.forEach((number, i) => {
    let low = 0;
    let high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[ends[middle]] < number) low = middle + 1;
      else high = middle;
    }
    before[i] = low ? ends[low - 1] : -1;
    ends[low] = i;
  });
  const found = [];
  for (let i = ends.length ? ends[ends.length - 1] : -1; i >= 0; i = before[i]) found.push(i);
  return found.reverse();
}

/** What makes a node of one stage the same as one of the other, the surest first. */
const SAME_NODE = [
  ({ node }) => node.name, // unique in a graph
  ({ node }) => `${node.op} ${node.target} ${node.value} ${node.path}`,
];
/** What stands beside a node that is gone: what is computed for the same sites, or in the same module. */
const SAME_PLACE = [
  ({ sites }) => sites.map((site) => site.path).join(),
  ({ node }) => node.path,
];

/** Indices of entries with the same key, in the same order on both sides. Of several the first is the other's first. */
function pairsBy(key, left, right) {
  const places = new Map();
  right.forEach((entry, j) => {
    const own = key(entry);
    if (!own) return;
    if (!places.has(own)) places.set(own, []);
    places.get(own).push(j);
  });
  const taken = new Map();
  const pairs = [];
  left.forEach((entry, i) => {
    const own = key(entry);
    const at = taken.get(own) || 0;
    taken.set(own, at + 1);
    if (places.has(own) && at < places.get(own).length) pairs.push([i, places.get(own)[at]]);
  });
  return longestIncreasing(pairs.map(([, j]) => j)).map((at) => pairs[at]);
}

/** Rows of two runs of entries: pairs by the first of `keys`, and what lies between them by the others. */
function aligned(left, right, keys = [...SAME_NODE, ...SAME_PLACE]) {
  if (!keys.length || !left.length || !right.length) {
    return Array.from({ length: Math.max(left.length, right.length) }, (_, at) => {
      const [a, b] = [left[at] || null, right[at] || null];
      return { kind: a && b ? "replaced" : a ? "removed" : "added", a, b };
    });
  }
  const [key, ...others] = keys;
  const rows = [];
  let [i, j] = [0, 0];
  const between = (toI, toJ) => {
    for (const row of aligned(left.slice(i, toI), right.slice(j, toJ), others)) rows.push(row);
  };
  for (const [atI, atJ] of pairsBy(key, left, right)) {
    between(atI, atJ);
    const [a, b] = [left[atI], right[atJ]];
    const kind = a.node.line === b.node.line ? "same" : "changed";
    rows.push({ kind: SAME_NODE.includes(key) ? kind : "replaced", a, b });
    [i, j] = [atI + 1, atJ + 1];
  }
  between(left.length, right.length);
  return rows;
}

/** The calls of bodies in the graph of `stage` that `other` does not have: the module that each computes, and the body. */
function callsIn(stage, other) {
  const bodyOf = (entry) => entry.inputs.find(({ node }) => node.op === "get_attr" && stage.names.includes(node.target));
  return stage.entries
    .filter((entry) => entry.part === 0 && entry.node.path && bodyOf(entry))
    .map((entry) => ({ path: entry.node.path, body: bodyOf(entry).node.target }))
    .filter(({ body }) => !other.names.includes(body));
}

/** Entries of `from` that are gone from the graph of `to`, each with the call that computes it there. */
function movedInto(calls, from, to) {
  const kept = new Set(to.entries.filter((entry) => entry.part === 0).map((entry) => entry.node.name));
  const found = new Map();
  let last = null;
  for (const entry of calls.length ? from.entries : []) {
    const { name, path } = entry.node;
    if (entry.part !== 0 || kept.has(name)) continue;
    // What passes have made may have no path; it stands among what it was made for.
    if (path) last = calls.find((call) => path === call.path || path.startsWith(`${call.path}.`)) || null;
    if (last) found.set(entry, last);
  }
  return found;
}

/** All rows of the diff of two stages, one part (the graph, a body) after the other. A layer that became the call of a body is "moved"; the body stands beside the first such layer. */
function diffRows(from, to) {
  if (callsIn(from, to).length) return diffRows(to, from).map(mirrored);
  const calls = callsIn(to, from);
  const moved = movedInto(calls, from, to);
  const names = [...new Set([...from.names, ...to.names])];
  const lines = (stage, name) => stage.entries.filter((entry) => stage.names[entry.part] === name);
  const rows = [];
  for (const name of names) {
    if (names.length > 1) rows.push({ kind: "head", text: name || "forward" });
    const call = calls.find(({ body }) => body === name);
    const left = call ? from.entries.filter((entry) => moved.get(entry) === call) : lines(from, name);
    const gone = call ? [] : left.filter((entry) => moved.has(entry));
    const rest = left.filter((entry) => call || !moved.has(entry));
    for (const row of aligned(rest, lines(to, name))) {
      while (gone.length && row.a && gone[0].index < row.a.index) rows.push(movedRow(gone.shift(), moved));
      if (row.b || !call) rows.push(row);
    }
    rows.push(...gone.map((entry) => movedRow(entry, moved)));
  }
  return rows;
}

function movedRow(entry, moved) {
  return { kind: "moved", a: entry, b: null, call: moved.get(entry) };
}

/** The row with its sides exchanged. */
function mirrored(row) {
  const kind = { removed: "added", added: "removed" }[row.kind] || row.kind;
  return { ...row, kind, a: row.b || null, b: row.a || null };
}

function diffCounts(rows) {
  const count = (...kinds) => rows.filter((row) => kinds.includes(row.kind)).length;
  return {
    removed: count("removed", "replaced"),
    added: count("added", "replaced"),
    changed: count("changed"),
    moved: count("moved"),
  };
}

/** Rows with long runs of equal lines folded, and layers that moved, but for those in `open`. */
function folded(rows, open) {
  const found = [];
  for (let i = 0, end; i < rows.length; i = end) {
    const { kind, call } = rows[i];
    end = i + 1;
    if (kind !== "same" && kind !== "moved") {
      found.push(rows[i]);
      continue;
    }
    while (end < rows.length && rows[end].kind === kind && rows[end].call === call) end++;
    const context = (row) => (kind === "same" && row && row.kind !== "head" ? CONTEXT : 0);
    const lead = context(rows[i - 1]);
    const tail = context(rows[end]);
    const hidden = end - i - lead - tail;
    const { key } = rows[i].a || rows[i].b;
    if (hidden > 1 && !open.has(key)) {
      const text = call ? `${hidden} lines of ${call.path}: a call of ${call.body} on the other side` : `${hidden} equal lines`;
      found.push(...rows.slice(i, i + lead), { kind: "fold", key, text }, ...rows.slice(end - tail, end));
    } else {
      found.push(...rows.slice(i, end));
    }
  }
  return found;
}

/** The line of `entry`, with what differs from the line of `other` marked. */
function lineElement(entry, other) {
  if (!entry) return element("span", "none");
  const line = entry.node.line;
  if (!other) return element("span", "", line);
  const theirs = other.node.line;
  let start = 0;
  while (start < line.length && line[start] === theirs[start]) start++;
  let end = 0;
  const most = Math.min(line.length, theirs.length) - start;
  while (end < most && line[line.length - 1 - end] === theirs[theirs.length - 1 - end]) end++;
  const middle = line.slice(start, line.length - end);
  return element(
    "span", "", line.slice(0, start), middle ? element("mark", "", middle) : null,
    line.slice(line.length - end),
  );
}
