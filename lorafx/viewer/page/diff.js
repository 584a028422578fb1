// What changed between two stages. Names of nodes are unique in a graph, so the lines that both
// have are the longest run of names in the same order (a patience diff): n log n for n nodes.
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

function rowsOfPart(left, right) {
  const places = new Map(right.map((entry, i) => [entry.node.name, i]));
  const common = left.map((entry, i) => i).filter((i) => places.has(left[i].node.name));
  const kept = longestIncreasing(common.map((i) => places.get(left[i].node.name)));
  const rows = [];
  let i = 0;
  let j = 0;
  const gap = (toI, toJ) => {
    for (; i < toI || j < toJ; i += i < toI, j += j < toJ) {
      const a = i < toI ? left[i] : null;
      const b = j < toJ ? right[j] : null;
      rows.push({ kind: a && b ? "replaced" : a ? "removed" : "added", a, b });
    }
  };
  for (const each of kept) {
    const at = common[each];
    gap(at, places.get(left[at].node.name));
    const [a, b] = [left[i++], right[j++]];
    rows.push({ kind: a.node.line === b.node.line ? "same" : "changed", a, b });
  }
  gap(left.length, right.length);
  return rows;
}

/** All rows of the diff of two stages, one part (the graph, a body) after the other. */
function diffRows(from, to) {
  const names = [...new Set([...from.names, ...to.names])];
  const lines = (stage, name) => {
    const part = stage.names.indexOf(name);
    return part < 0 ? [] : stage.entries.filter((entry) => entry.part === part);
  };
  const rows = [];
  for (const name of names) {
    if (names.length > 1) rows.push({ kind: "head", text: name || "forward" });
    rows.push(...rowsOfPart(lines(from, name), lines(to, name)));
  }
  return rows;
}

function diffCounts(rows) {
  const count = (...kinds) => rows.filter((row) => kinds.includes(row.kind)).length;
  return {
    removed: count("removed", "replaced"),
    added: count("added", "replaced"),
    changed: count("changed"),
  };
}

/** Rows with long runs of equal lines folded, but for those in `open`. */
function folded(rows, open) {
  const found = [];
  for (let i = 0; i < rows.length; ) {
    let end = i;
    while (end < rows.length && rows[end].kind === "same") end++;
    const lead = i > 0 && rows[i - 1].kind !== "head" ? CONTEXT : 0;
    const tail = end < rows.length && rows[end].kind !== "head" ? CONTEXT : 0;
    if (end - i > lead + tail + 1 && !open.has(rows[i].a.key)) {
      const hidden = end - i - lead - tail;
      found.push(...rows.slice(i, i + lead));
      found.push({ kind: "fold", key: rows[i].a.key, text: `${hidden} equal lines` });
      found.push(...rows.slice(end - tail, end));
    } else {
      found.push(...rows.slice(i, end));
    }
    if (end < rows.length) found.push(rows[end]);
    i = end + 1;
  }
  return found;
}

/** One line each: where there is no room for two side by side. */
function unified(rows) {
  const found = [];
  let added = [];
  for (const row of rows) {
    if (row.kind === "replaced" || row.kind === "changed") {
      if (row.kind === "changed" && added.length) found.push(...added.splice(0));
      found.push({ kind: "removed", a: row.a, b: null, other: row.kind === "changed" ? row.b : null });
      added.push({ kind: "added", a: null, b: row.b, other: row.kind === "changed" ? row.a : null });
      if (row.kind === "changed") found.push(...added.splice(0));
    } else {
      if (row.kind !== "removed") found.push(...added.splice(0));
      found.push(row);
    }
  }
  return found.concat(added);
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
