// How nodes, groups and edges look on the canvas.
"use strict";

const TEXT_FROM = 0.42; // scale below which texts are left out
const EDGES_FROM = 0.12;
const COLORS_FROM = 0.2;
const COLORS = [
  "canvas", "group", "group-line", "node", "node-line", "text", "muted", "edge", "accent", "sites",
  "sites-line", "packs", "packs-line", "refused", "refused-line", "input", "changed", "reads",
  "users",
];

function kindOf(tags) {
  return ["refused", "packs", "sites"].find((tag) => tags[tag]) || null;
}

class Pen {
  constructor(context) {
    this.context = context;
    this.readColors();
  }

  /** The colours of the style sheet, for the theme that is shown. */
  readColors() {
    const probe = document.body.appendChild(element("i"));
    const color = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    this.colors = Object.fromEntries(COLORS.map((name) => [name, color(name)]));
    probe.remove();
    this.font = getComputedStyle(document.body).fontFamily;
  }

  box(box, radius, fill, line, width = 1) {
    const { context } = this;
    context.beginPath();
    context.roundRect(box.x, box.y, box.width, box.height, radius);
    if (fill) {
      context.fillStyle = fill;
      context.fill();
    }
    context.strokeStyle = line;
    context.lineWidth = width;
    context.stroke();
  }

  /** A line through points, with an arrow's head of that size. */
  line(points, head) {
    const { context } = this;
    const end = points[points.length - 1];
    context.beginPath();
    context.moveTo(points[0].x, points[0].y);
    for (let i = 1; i < points.length - 1; i++) {
      const [a, b] = [points[i], points[i + 1]];
      context.quadraticCurveTo(a.x, a.y, (a.x + b.x) / 2, (a.y + b.y) / 2);
    }
    context.lineTo(end.x, end.y);
    context.stroke();
    if (!head) return;
    context.beginPath();
    context.moveTo(end.x - head * 0.6, end.y - head);
    context.lineTo(end.x, end.y);
    context.lineTo(end.x + head * 0.6, end.y - head);
    context.stroke();
  }

  /** From the bottom of a box to the top of another. */
  curve(from, to, color) {
    const { context } = this;
    const [a, b] = [
      { x: from.x + from.width / 2, y: from.y + from.height },
      { x: to.x + to.width / 2, y: to.y },
    ];
    const bend = Math.max(24, Math.abs(b.y - a.y) / 3);
    context.strokeStyle = color;
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(a.x, a.y);
    context.bezierCurveTo(a.x, a.y + bend, b.x, b.y - bend, b.x, b.y);
    context.stroke();
  }

  /** A text cut to a width; texts of one font are as wide as their letters, nearly. */
  text(text, x, y, width, size, color, weight = 400) {
    const { context } = this;
    context.font = `${weight} ${size}px ${this.font}`;
    context.fillStyle = color;
    const full = context.measureText(text).width;
    if (full > width) {
      text = `${text.slice(0, Math.max(1, Math.floor((text.length * width) / full) - 1))}…`;
    }
    context.fillText(text, x, y);
  }

  heading(text, x, y, size) {
    const { context, colors } = this;
    context.font = `600 ${size}px ${this.font}`;
    context.textAlign = "center";
    context.fillStyle = colors.text;
    context.fillText(text, x, y);
    context.textAlign = "left";
  }

  node(entry, name, box, scale) {
    const { context, colors } = this;
    const { tags, node } = entry;
    const kind = kindOf(tags);
    const line = kind ? colors[`${kind}-line`] : colors["node-line"];
    if (scale < COLORS_FROM) { // a pale box would not be seen
      context.fillStyle = tags.changed && !kind ? colors.changed : line;
      context.fillRect(box.x, box.y, box.width, box.height);
      return;
    }
    const plain = node.op === "placeholder" ? colors.input : colors.node;
    this.box(box, 5, kind ? colors[kind] : plain, line, kind ? 1.5 : 1);
    if (tags.changed) {
      context.fillStyle = colors.changed;
      context.beginPath();
      context.roundRect(box.x + box.width - 9, box.y - 3, 12, 12, 6);
      context.fill();
    }
    if (scale < TEXT_FROM) return;
    const shape = node.value.replace(/^(b?)float/, "$1f").replace(/^int/, "i");
    const [x, width] = [box.x + 8, box.width - 16];
    this.text(name, x, box.y + 16, width, 12, colors.text, 600);
    this.text(`${shortTarget(node)}  ${shape}`, x, box.y + 31, width, 11, colors.muted);
  }

  /** A group's own box, without what is in it. */
  group(group, scale) {
    const { context, colors } = this;
    this.box(group, 8, colors.group, colors["group-line"]);
    if (scale * GROUP.width < 60) return;
    const { sites, changed, kind } = group.counts;
    if (kind) {
      context.fillStyle = colors[`${kind}-line`];
      context.fillRect(group.x, group.y + 8, 4, (group.layout ? GROUP.head : group.height) - 16);
    }
    const label = `${group.layout ? "▾" : "▸"} ${group.label}`;
    this.text(label, group.x + 14, group.y + 21, group.width - 28, 14, colors.text, 600);
    if (group.layout) return;
    const facts = [`${group.entries.length} nodes`];
    if (sites) facts.push(`${sites} site${sites > 1 ? "s" : ""}`);
    if (changed) facts.push(`${changed} changed`);
    if (kind === "refused") facts.push("refused");
    this.text(facts.join(" · "), group.x + 30, group.y + 40, group.width - 44, 12, colors.muted);
  }

  /** The label of a group that is seen from far, over its nodes. */
  farLabel(group, scale) {
    const { context, colors } = this;
    const size = Math.min(group.width / Math.max(4, group.label.length * 0.62), 14 / scale);
    if (size * scale < 7) return;
    context.font = `600 ${size}px ${this.font}`;
    const width = context.measureText(group.label).width + size;
    const x = group.x + group.width / 2;
    const y = group.y + Math.min(group.height / 2, 40 / scale);
    context.fillStyle = colors.group;
    context.globalAlpha = 0.85;
    context.fillRect(x - width / 2, y - size, width, size * 1.5);
    context.globalAlpha = 1;
    this.heading(group.label, x, y, size);
  }
}
