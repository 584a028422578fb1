// The graph on a canvas. Only what is in view is drawn, and a group is laid out when it is opened.
"use strict";

const SMALL = 400; // nodes of a graph that is opened as a whole

class Scene {
  /** `picked(entry)` is called with the entry that was clicked, or null. */
  constructor(canvas, picked) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.pen = new Pen(this.context);
    this.picked = picked;
    this.camera = new Camera();
    this.open = new Set(); // keys of groups
    this.groups = [];
    this.pending = []; // groups that `openAll` has still to open
    this.selected = null;
    this.revealed = null; // the entry that stays in the middle, until somebody looks elsewhere
    this.filter(null);
    this.drawn = { nodes: 0, milliseconds: 0 };
    new ResizeObserver(() => this.resize()).observe(canvas);
    follow(canvas, this.camera, () => this.moved(), (x, y) => this.click(x, y));
  }

  // --- what is shown ---

  show(stage, withState, { keepPlace = false } = {}) {
    this.stage = stage;
    this.revealed = null;
    this.groups = groupsOf(stage, withState);
    this.home = new Map();
    for (const group of this.groups) {
      for (const entry of group.entries) this.home.set(entry, group);
      group.counts = countsOf(group);
    }
    this.pending = [];
    if (!keepPlace) {
      this.open.clear();
      const count = this.groups.reduce((sum, group) => sum + group.entries.length, 0);
      if (count <= SMALL) this.groups.forEach((group) => this.open.add(group.key));
      else if (innerWidth > 720) this.openOneWithSites();
    }
    this.arrange();
    if (!keepPlace) this.toTop();
    this.invalidate();
  }

  openOneWithSites() {
    const group = this.groups.find((each) => each.counts.sites) || this.groups[0];
    if (group) this.open.add(group.key);
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
    this.moved();
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
    const { y } = this.camera.at(0, this.camera.height / 2);
    const groups = this.groups.filter((group) => group.part === 0);
    return groups.find((group) => group.y + group.height >= y) || groups[groups.length - 1];
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
    this.revealed = entry;
    if (!this.open.has(group.key)) {
      this.open.add(group.key);
      this.arrange();
    }
    const { x, y } = this.placeOf(entry);
    const middle = { x: x + NODE.width / 2, y: y + NODE.height / 2 };
    this.camera.center(middle, Math.max(this.camera.scale, 0.8));
    this.invalidate();
  }

  /** The box of an entry, or of its group where that is closed. */
  placeOf(entry) {
    const group = this.home.get(entry);
    if (!group || !group.layout) return group;
    return this.inside(group, group.layout.places[group.entries.indexOf(entry)]);
  }

  inside(group, point) {
    const margin = (group.width - group.layout.width) / 2;
    return { x: group.x + margin + point.x, y: group.y + GROUP.head + point.y, ...NODE };
  }

  // --- where one looks ---

  /** Somebody looks elsewhere. */
  moved() {
    this.revealed = null;
    this.invalidate();
  }

  resize() {
    const box = this.canvas.getBoundingClientRect();
    const first = !this.camera.width && box.width;
    this.camera.width = box.width;
    this.camera.height = box.height;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    if (this.revealed) this.reveal(this.revealed);
    else if (first && this.stage) this.toTop();
    this.draw();
  }

  /** The beginning of the graph, over the width of the canvas where it can be read so. */
  toTop() {
    const { camera } = this;
    if (!camera.width || !this.groups.length) return;
    const column = columnsOf(this.groups.filter((group) => group.part === 0))[0];
    const width = Math.max(...column.map((group) => group.width));
    camera.scale = Math.min(1, Math.max(0.5, (camera.width - 32) / width));
    const middle = column[0].x + column[0].width / 2;
    camera.x = middle - camera.width / 2 / camera.scale;
    camera.y = -20 / camera.scale;
    this.moved();
  }

  fit() {
    if (!this.groups.length) return;
    const x = Math.min(...this.groups.map((group) => group.x));
    const y = Math.min(...this.groups.map((group) => group.y));
    const right = Math.max(...this.groups.map((group) => group.x + group.width));
    const bottom = Math.max(...this.groups.map((group) => group.y + group.height));
    this.camera.fit({ x, y, width: right - x, height: bottom - y });
    this.moved();
  }

  zoom(factor) {
    this.camera.zoom(factor);
    this.invalidate();
  }

  click(x, y) {
    const at = this.camera.at(x, y);
    const within = (box) =>
      at.x >= box.x && at.x <= box.x + box.width && at.y >= box.y && at.y <= box.y + box.height;
    const group = this.groups.find(within);
    if (!group) return this.picked(null);
    if (!group.layout || at.y < group.y + GROUP.head) return this.toggle(group);
    const index = group.layout.places.findIndex((place) => within(this.inside(group, place)));
    this.picked(index < 0 ? null : group.entries[index]);
  }

  // --- drawing ---

  readColors() {
    this.pen.readColors();
    this.invalidate();
  }

  invalidate() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.asked = false;
    const start = performance.now();
    const { context, camera, pen } = this;
    if (!camera.width || !this.stage) return;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = pen.colors.canvas;
    context.fillRect(0, 0, camera.width, camera.height);
    context.scale(camera.scale, camera.scale);
    context.translate(-camera.x, -camera.y);
    this.drawn.nodes = 0;
    this.drawBodies();
    this.drawArrows();
    for (const group of this.groups) {
      if (!camera.sees(group)) continue;
      const faded = this.filtering && !group.layout && !group.entries.some(this.shown);
      context.globalAlpha = faded ? 0.3 : 1;
      pen.group(group, camera.scale);
      context.globalAlpha = 1;
      if (group.layout) this.drawInside(group);
    }
    if (this.selected && this.home.has(this.selected)) this.drawSelected();
    this.drawn.milliseconds = performance.now() - start;
  }

  drawBodies() {
    this.stage.names.forEach((name, part) => {
      const group = part && this.groups.find((each) => each.part === part);
      if (!group) return;
      this.pen.heading(`${name}, called by the graph`, group.x + group.width / 2, group.y - 14, 16);
    });
  }

  /** An arrow from each group to the next one, where that reads something of it. */
  drawArrows() {
    const { context, pen, camera } = this;
    const { top, bottom } = camera.view;
    this.groups.forEach((to, i) => {
      const from = this.groups[i - 1];
      if (!from || from.part !== to.part || !this.reads(to, from)) return;
      if (to.y < from.y) { // the next column
        context.globalAlpha = 0.5;
        pen.curve(from, to, pen.colors.edge);
        context.globalAlpha = 1;
      } else if (to.y > top && from.y + from.height < bottom) {
        const x = to.x + to.width / 2;
        context.strokeStyle = pen.colors.edge;
        context.lineWidth = 2;
        pen.line([{ x, y: from.y + from.height }, { x, y: to.y - 4 }], 7);
      }
    });
  }

  reads(to, from) {
    if (to.readsLast === undefined) {
      to.readsLast = to.entries.some((entry) =>
        entry.inputs.some((input) => this.home.get(input) === from));
    }
    return to.readsLast;
  }

  drawInside(group) {
    const { context, camera, pen } = this;
    const { layout, entries } = group;
    if (camera.scale > EDGES_FROM) {
      context.strokeStyle = pen.colors.edge;
      context.lineWidth = 1;
      for (const edge of layout.edges) {
        const points = edge.points.map((point) => this.inside(group, point));
        const ys = points.map((point) => point.y);
        const y = Math.min(...ys);
        if (!camera.sees({ ...group, y, height: Math.max(...ys) - y })) continue;
        const shown = this.shown(entries[edge.from]) || this.shown(entries[edge.to]);
        context.globalAlpha = shown ? 1 : 0.25;
        pen.line(points, camera.scale > TEXT_FROM ? 5 : 0);
      }
    }
    entries.forEach((entry, i) => {
      const box = this.inside(group, layout.places[i]);
      if (!camera.sees(box)) return;
      this.drawn.nodes++;
      context.globalAlpha = this.shown(entry) ? 1 : 0.25;
      pen.node(entry, shortName(entry, group), box, camera.scale);
    });
    context.globalAlpha = 1;
    if (camera.scale < COLORS_FROM) pen.farLabel(group, camera.scale);
  }

  drawSelected() {
    const { pen } = this;
    const own = this.placeOf(this.selected);
    const places = (entries) => entries.map((entry) => this.placeOf(entry)).filter(Boolean);
    for (const place of places(this.selected.inputs)) pen.curve(place, own, pen.colors.reads);
    for (const place of places(this.selected.users)) pen.curve(own, place, pen.colors.users);
    const around = { x: own.x - 2, y: own.y - 2, width: own.width + 4, height: own.height + 4 };
    pen.box(around, 7, null, pen.colors.accent, 3);
  }
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
