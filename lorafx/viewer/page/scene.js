// The graph on a canvas. Only what is in view is drawn, and a group is laid out when it is opened.
"use strict";

const TEXT_FROM = 0.42; // scale below which texts are left out
const EDGES_FROM = 0.12;
const COLORS_FROM = 0.2;

class Scene {
  /** `picked(entry)` is called with the entry that was clicked, or null. */
  constructor(canvas, picked) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.picked = picked;
    this.camera = { x: 0, y: 0, scale: 1 };
    this.open = new Set();
    this.groups = [];
    this.selected = null;
    this.shown = () => true;
    this.filtering = false;
    this.pending = [];
    this.middle = 0.5; // of the height that nothing covers
    this.drawn = { nodes: 0, milliseconds: 0 };
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
    this.readColors();
  }

  readColors() {
    const probe = document.body.appendChild(element("i"));
    const color = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    const names = [
      "canvas", "group", "group-line", "node", "node-line", "text", "muted", "edge", "accent",
      "sites", "sites-line", "packs", "packs-line", "refused", "refused-line", "input", "changed",
      "reads", "users",
    ];
    this.colors = Object.fromEntries(names.map((name) => [name, color(name)]));
    probe.remove();
    this.font = getComputedStyle(document.body).fontFamily;
    this.invalidate();
  }

  // --- what is shown ---

  show(stage, withState, { keepPlace = false } = {}) {
    this.stage = stage;
    this.groups = groupsOf(stage, withState);
    this.home = new Map();
    for (const group of this.groups) {
      for (const entry of group.entries) this.home.set(entry, group);
    }
    const count = this.groups.reduce((sum, group) => sum + group.entries.length, 0);
    this.pending = [];
    if (!keepPlace) {
      this.open.clear();
      if (count <= 400) this.groups.forEach((group) => this.open.add(group.key));
      else if (innerWidth > 720) this.openOneWithSites();
    }
    this.arrange();
    if (!keepPlace) this.toTop();
    this.invalidate();
  }

  openOneWithSites() {
    const group = this.groups.find((each) => each.entries.some((entry) => entry.tags.sites));
    this.open.add((group || this.groups[0] || {}).key);
  }

  /** Give each group its place: columns for the graph, then those of each body that it calls. */
  arrange() {
    let left = 0;
    for (let part = 0; part < (this.stage ? this.stage.names.length : 0); part++) {
      const groups = this.groups.filter((group) => group.part === part);
      for (const group of groups) {
        group.layout = this.open.has(group.key) ? layoutOf(group) : null;
        const { layout } = group;
        group.width = layout ? Math.max(layout.width + 2 * GROUP.pad, GROUP.width) : GROUP.width;
        group.height = layout ? layout.height + GROUP.head + GROUP.pad : GROUP.height;
      }
      for (const column of columnsOf(groups)) {
        const width = Math.max(0, ...column.map((group) => group.width));
        let top = part ? GROUP.head : 0;
        for (const group of column) {
          group.x = left + (width - group.width) / 2;
          group.y = top;
          top += group.height + GROUP.gap;
        }
        left += width + 2 * GROUP.gap;
      }
      left += GROUP.column;
    }
    this.crossing = null;
  }

  toggle(group) {
    this.keepInPlace(group, () => {
      if (!this.open.delete(group.key)) this.open.add(group.key);
      this.arrange();
    });
  }

  /** Change the arrangement with `group` staying where it is on the screen. */
  keepInPlace(group, change) {
    const { x, y, width } = group;
    change();
    this.camera.x += group.x + group.width / 2 - x - width / 2;
    this.camera.y += group.y - y;
    this.invalidate();
  }

  /** Open all groups, a few in each frame. */
  openAll() {
    this.pending = this.groups.filter((group) => !this.open.has(group.key));
    const step = () => {
      const end = performance.now() + 12;
      const anchor = this.groupInTheMiddle();
      if (!this.pending.length || !anchor) return;
      this.keepInPlace(anchor, () => {
        while (this.pending.length && performance.now() < end) {
          const group = this.pending.shift();
          layoutOf(group);
          this.open.add(group.key);
        }
        this.arrange();
      });
      requestAnimationFrame(step);
    };
    step();
  }

  closeAll() {
    this.pending = [];
    this.open.clear();
    this.arrange();
    this.toTop();
  }

  groupInTheMiddle() {
    const middle = this.camera.y + this.height / 2 / this.camera.scale;
    const groups = this.groups.filter((group) => group.part === 0);
    return groups.find((group) => group.y + group.height >= middle) || groups[groups.length - 1];
  }

  select(entry) {
    this.selected = entry;
    this.invalidate();
  }

  /** Fade all that `shown` is false for. */
  filter(shown) {
    this.shown = shown || (() => true);
    this.filtering = Boolean(shown);
    this.invalidate();
  }

  /** Bring an entry into the middle, its group opened. */
  reveal(entry) {
    const group = this.home.get(entry);
    if (!group) return;
    if (!this.open.has(group.key)) {
      this.open.add(group.key);
      this.arrange();
    }
    const { x, y } = this.placeOf(entry);
    const scale = Math.max(this.camera.scale, 0.8);
    this.camera.scale = scale;
    this.camera.x = x + NODE.width / 2 - this.width / 2 / scale;
    this.camera.y = y + NODE.height / 2 - (this.height * this.middle) / scale;
    this.invalidate();
  }

  placeOf(entry) {
    const group = this.home.get(entry);
    if (!group) return null;
    if (!group.layout) return { x: group.x, y: group.y, width: group.width, height: group.height };
    const place = group.layout.places[group.entries.indexOf(entry)];
    return { ...this.inside(group, place), ...NODE };
  }

  inside(group, point) {
    const margin = (group.width - group.layout.width) / 2;
    return { x: group.x + margin + point.x, y: group.y + GROUP.head + point.y };
  }

  // --- the camera ---

  resize() {
    const box = this.canvas.getBoundingClientRect();
    const first = !this.width && box.width;
    this.width = box.width;
    this.height = box.height;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    if (first && this.stage) this.toTop();
    this.draw();
  }

  bounds() {
    if (!this.groups.length) return { x: 0, y: 0, width: 1, height: 1 };
    const x = Math.min(...this.groups.map((group) => group.x));
    const y = Math.min(...this.groups.map((group) => group.y));
    return {
      x, y,
      width: Math.max(...this.groups.map((group) => group.x + group.width)) - x,
      height: Math.max(...this.groups.map((group) => group.y + group.height)) - y,
    };
  }

  /** The beginning of the graph, over the width of the canvas where it can be read so. */
  toTop() {
    if (!this.width || !this.groups.length) return;
    const column = columnsOf(this.groups.filter((group) => group.part === 0))[0];
    const width = Math.max(...column.map((group) => group.width));
    const scale = Math.min(1, Math.max(0.5, (this.width - 32) / width));
    const middle = column[0].x + column[0].width / 2;
    this.camera = { x: middle - this.width / 2 / scale, y: -20 / scale, scale };
    this.invalidate();
  }

  fit() {
    const box = this.bounds();
    const scale = Math.min(this.width / (box.width + 40), this.height / (box.height + 40), 1);
    this.camera = {
      x: box.x + box.width / 2 - this.width / 2 / scale,
      y: box.y + box.height / 2 - this.height / 2 / scale,
      scale,
    };
    this.invalidate();
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const { camera } = this;
    const scale = Math.min(3, Math.max(0.01, camera.scale * factor));
    camera.x += x / camera.scale - x / scale;
    camera.y += y / camera.scale - y / scale;
    camera.scale = scale;
    this.invalidate();
  }

  listen() {
    const { canvas, camera } = this;
    const pointers = new Map();
    let moved = 0;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) {
        this.zoom(Math.exp(-event.deltaY * 0.01), event.offsetX, event.offsetY);
      } else {
        const swap = event.shiftKey && !event.deltaX;
        this.camera.x += (swap ? event.deltaY : event.deltaX) / this.camera.scale;
        this.camera.y += (swap ? 0 : event.deltaY) / this.camera.scale;
        this.invalidate();
      }
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      if (pointers.size === 1) moved = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const other = [...pointers.values()].find((each) => each.pointerId !== event.pointerId);
      if (other) {
        const distance = (a) => Math.hypot(a.offsetX - other.offsetX, a.offsetY - other.offsetY);
        const factor = distance(event) / Math.max(1, distance(before));
        this.zoom(factor, (event.offsetX + other.offsetX) / 2, (event.offsetY + other.offsetY) / 2);
        moved = 100;
      } else {
        this.camera.x -= (event.offsetX - before.offsetX) / this.camera.scale;
        this.camera.y -= (event.offsetY - before.offsetY) / this.camera.scale;
        moved += Math.abs(event.offsetX - before.offsetX) + Math.abs(event.offsetY - before.offsetY);
        this.invalidate();
      }
      pointers.set(event.pointerId, event);
    });
    const ended = (event) => {
      const known = pointers.delete(event.pointerId);
      if (known && event.type === "pointerup" && moved < 6 && !pointers.size) {
        this.click(event.offsetX, event.offsetY);
      }
    };
    canvas.addEventListener("pointerup", ended);
    canvas.addEventListener("pointercancel", ended);
    canvas.addEventListener("keydown", (event) => {
      const step = 80 / this.camera.scale;
      const moves = { ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 1.25 : 0.8);
      else if (moves[event.key]) {
        this.camera.x += moves[event.key][0];
        this.camera.y += moves[event.key][1];
        this.invalidate();
        event.preventDefault();
      }
    });
  }

  click(x, y) {
    const at = { x: this.camera.x + x / this.camera.scale, y: this.camera.y + y / this.camera.scale };
    const within = (box) =>
      at.x >= box.x && at.x <= box.x + box.width && at.y >= box.y && at.y <= box.y + box.height;
    const group = this.groups.find(within);
    if (!group) return this.picked(null);
    if (!group.layout || at.y < group.y + GROUP.head) return this.toggle(group);
    const index = group.layout.places.findIndex((place) =>
      within({ ...this.inside(group, place), ...NODE }));
    this.picked(index < 0 ? null : group.entries[index]);
  }

  // --- drawing ---

  invalidate() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.asked = false;
    const start = performance.now();
    const { context, camera, colors } = this;
    if (!this.width || !this.stage) return;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = colors.canvas;
    context.fillRect(0, 0, this.width, this.height);
    context.scale(camera.scale, camera.scale);
    context.translate(-camera.x, -camera.y);
    const view = {
      left: camera.x, top: camera.y,
      right: camera.x + this.width / camera.scale, bottom: camera.y + this.height / camera.scale,
    };
    const inView = (box) => box.x < view.right && box.x + box.width > view.left
      && box.y < view.bottom && box.y + box.height > view.top;
    this.drawn.nodes = 0;
    this.drawColumns();
    this.drawCrossing(view);
    for (const group of this.groups) if (inView(group)) this.drawGroup(group, inView);
    if (this.selected && this.home.has(this.selected)) this.drawSelected();
    this.drawn.milliseconds = performance.now() - start;
  }

  drawColumns() {
    const { context, colors } = this;
    this.stage.names.forEach((name, part) => {
      const group = part && this.groups.find((each) => each.part === part);
      if (!group) return;
      context.fillStyle = colors.text;
      context.font = `600 16px ${this.font}`;
      context.textAlign = "center";
      context.fillText(`${name}, called by the graph`, group.x + group.width / 2, group.y - 14);
      context.textAlign = "left";
    });
  }

  /** An arrow from each group to the next one that reads something of it. */
  drawCrossing(view) {
    const { context, colors } = this;
    if (!this.crossing) {
      this.crossing = [];
      const index = new Map(this.groups.map((group, i) => [group, i]));
      this.groups.forEach((group, to) => {
        const from = new Set(group.entries.flatMap((entry) => entry.inputs)
          .map((input) => index.get(this.home.get(input))));
        if (from.has(to - 1)) this.crossing.push([this.groups[to - 1], group]);
      });
    }
    context.strokeStyle = colors.edge;
    context.lineWidth = 2;
    for (const [from, to] of this.crossing) {
      if (to.y < from.y) { // the next column
        context.globalAlpha = 0.5;
        this.curve(from, to);
        context.globalAlpha = 1;
      } else if (to.y > view.top && from.y + from.height < view.bottom) {
        const x = to.x + to.width / 2;
        this.line([{ x, y: from.y + from.height }, { x, y: to.y - 4 }], 7);
      }
    }
  }

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
  curve(from, to) {
    const { context } = this;
    const [a, b] = [
      { x: from.x + from.width / 2, y: from.y + from.height },
      { x: to.x + to.width / 2, y: to.y },
    ];
    const bend = Math.max(24, Math.abs(b.y - a.y) / 3);
    context.beginPath();
    context.moveTo(a.x, a.y);
    context.bezierCurveTo(a.x, a.y + bend, b.x, b.y - bend, b.x, b.y);
    context.stroke();
  }

  drawGroup(group, inView) {
    const { context, colors, camera } = this;
    const counted = group.counts || (group.counts = {
      sites: new Set(group.entries.flatMap((entry) => entry.sites.map((site) => site.path))).size,
      refused: group.entries.some((entry) => entry.tags.refused),
      packs: group.entries.some((entry) => entry.tags.packs),
      changed: group.entries.filter((entry) => entry.tags.changed).length,
    });
    const faded = this.filtering && !group.layout && !group.entries.some(this.shown);
    context.globalAlpha = faded ? 0.3 : 1;
    context.fillStyle = colors.group;
    context.strokeStyle = colors["group-line"];
    context.lineWidth = 1;
    context.beginPath();
    context.roundRect(group.x, group.y, group.width, group.height, 8);
    context.fill();
    context.stroke();
    if (camera.scale * GROUP.width > 60) {
      const kind = counted.refused ? "refused" : counted.packs ? "packs" : counted.sites ? "sites" : null;
      if (kind) {
        context.fillStyle = colors[`${kind}-line`];
        context.fillRect(group.x, group.y + 8, 4, (group.layout ? GROUP.head : group.height) - 16);
      }
      context.font = `600 14px ${this.font}`;
      context.fillStyle = colors.text;
      const sign = group.layout ? "▾" : "▸";
      this.text(`${sign} ${group.label}`, group.x + 14, group.y + 21, group.width - 28);
      if (!group.layout) {
        context.font = `12px ${this.font}`;
        context.fillStyle = colors.muted;
        const facts = [`${group.entries.length} nodes`];
        if (counted.sites) facts.push(`${counted.sites} site${counted.sites > 1 ? "s" : ""}`);
        if (counted.changed) facts.push(`${counted.changed} changed`);
        if (counted.refused) facts.push("refused");
        this.text(facts.join(" · "), group.x + 30, group.y + 40, group.width - 44);
      }
    }
    context.globalAlpha = 1;
    if (group.layout) this.drawInside(group, inView);
  }

  drawInside(group, inView) {
    const { context, colors, camera } = this;
    const { layout, entries } = group;
    if (camera.scale > EDGES_FROM) {
      context.strokeStyle = colors.edge;
      context.lineWidth = 1;
      for (const edge of layout.edges) {
        const points = edge.points.map((point) => this.inside(group, point));
        const ys = points.map((point) => point.y);
        const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
        if (!inView({ x: group.x, width: group.width, y: top, height: bottom - top })) continue;
        const shown = this.shown(entries[edge.from]) || this.shown(entries[edge.to]);
        context.globalAlpha = shown ? 1 : 0.25;
        this.line(points, camera.scale > TEXT_FROM ? 5 : 0);
      }
    }
    entries.forEach((entry, i) => {
      const box = { ...this.inside(group, layout.places[i]), ...NODE };
      if (inView(box)) this.drawNode(entry, box, group);
    });
    context.globalAlpha = 1;
    if (camera.scale >= COLORS_FROM) return;
    const size = Math.min(group.width / Math.max(4, group.label.length * 0.62), 14 / camera.scale);
    if (size * camera.scale < 7) return;
    context.font = `600 ${size}px ${this.font}`;
    const width = context.measureText(group.label).width + size;
    const [x, y] = [group.x + group.width / 2, group.y + Math.min(group.height / 2, 40 / camera.scale)];
    context.fillStyle = colors.group;
    context.globalAlpha = 0.85;
    context.fillRect(x - width / 2, y - size, width, size * 1.5);
    context.globalAlpha = 1;
    context.fillStyle = colors.text;
    context.textAlign = "center";
    context.fillText(group.label, x, y);
    context.textAlign = "left";
  }

  drawNode(entry, box, group) {
    const { context, colors, camera } = this;
    this.drawn.nodes++;
    const { tags, node } = entry;
    const kind = tags.refused ? "refused" : tags.packs ? "packs" : tags.sites ? "sites" : null;
    context.globalAlpha = this.shown(entry) ? 1 : 0.25;
    const line = kind ? colors[`${kind}-line`] : colors["node-line"];
    context.strokeStyle = line;
    if (camera.scale < COLORS_FROM) { // a pale box would not be seen
      context.fillStyle = tags.changed && !kind ? colors.changed : line;
      context.fillRect(box.x, box.y, box.width, box.height);
      return;
    }
    context.fillStyle = kind ? colors[kind] : node.op === "placeholder" ? colors.input : colors.node;
    context.lineWidth = kind ? 1.5 : 1;
    context.beginPath();
    context.roundRect(box.x, box.y, box.width, box.height, 5);
    context.fill();
    context.stroke();
    if (tags.changed) {
      context.fillStyle = colors.changed;
      context.beginPath();
      context.roundRect(box.x + box.width - 9, box.y - 3, 12, 12, 6);
      context.fill();
    }
    if (camera.scale < TEXT_FROM) return;
    context.fillStyle = colors.text;
    context.font = `600 12px ${this.font}`;
    this.text(shortName(entry, group), box.x + 8, box.y + 16, box.width - 16);
    context.fillStyle = colors.muted;
    context.font = `11px ${this.font}`;
    const shape = node.value.replace(/^(b?)float/, "$1f").replace(/^int/, "i");
    this.text(`${shortTarget(node)}  ${shape}`, box.x + 8, box.y + 31, box.width - 16);
  }

  drawSelected() {
    const { context, colors } = this;
    const own = this.placeOf(this.selected);
    const join = (from, to, color) => {
      context.strokeStyle = color;
      context.lineWidth = 2;
      this.curve(from, to);
    };
    for (const input of this.selected.inputs) {
      const place = this.placeOf(input);
      if (place) join(place, own, colors.reads);
    }
    for (const user of this.selected.users) {
      const place = this.placeOf(user);
      if (place) join(own, place, colors.users);
    }
    context.strokeStyle = colors.accent;
    context.lineWidth = 3;
    context.beginPath();
    context.roundRect(own.x - 2, own.y - 2, own.width + 4, own.height + 4, 7);
    context.stroke();
  }

  /** A text cut to a width; texts of one font are as wide as their letters, nearly. */
  text(text, x, y, width) {
    const { context } = this;
    const full = context.measureText(text).width;
    if (full > width) {
      text = `${text.slice(0, Math.max(1, Math.floor((text.length * width) / full) - 1))}…`;
    }
    context.fillText(text, x, y);
  }
}
