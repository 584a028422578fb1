// What part of the graph is seen, and the mouse, fingers and keys that change it.
"use strict";

class Camera {
  constructor() {
    this.x = 0; // of the upper left corner, in the graph's pixels
    this.y = 0;
    this.scale = 1;
    this.width = 0; // of the canvas
    this.height = 0;
    this.middle = 0.5; // of the height that nothing covers
  }

  get view() {
    const { x, y, scale } = this;
    return { left: x, top: y, right: x + this.width / scale, bottom: y + this.height / scale };
  }

  sees(box) {
    const view = this.view;
    return box.x < view.right && box.x + box.width > view.left
      && box.y < view.bottom && box.y + box.height > view.top;
  }

  at(x, y) {
    return { x: this.x + x / this.scale, y: this.y + y / this.scale };
  }

  move(x, y) {
    this.x += x / this.scale;
    this.y += y / this.scale;
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.min(3, Math.max(0.01, this.scale * factor));
    this.x += x / this.scale - x / scale;
    this.y += y / this.scale - y / scale;
    this.scale = scale;
  }

  center(point, scale) {
    this.scale = scale;
    this.x = point.x - this.width / 2 / scale;
    this.y = point.y - (this.height * this.middle) / scale;
  }

  fit(box) {
    const scale = Math.min(this.width / (box.width + 40), this.height / (box.height + 40), 1);
    this.scale = scale;
    this.x = box.x + box.width / 2 - this.width / 2 / scale;
    this.y = box.y + box.height / 2 - this.height / 2 / scale;
  }
}

/** Have what happens on `canvas` move `camera`; `changed()` after each move, `clicked(x, y)`. */
function follow(canvas, camera, changed, clicked) {
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const sideways = event.shiftKey && !event.deltaX;
    if (event.ctrlKey || event.metaKey) {
      camera.zoom(Math.exp(-event.deltaY * 0.01), event.offsetX, event.offsetY);
    } else {
      camera.move(sideways ? event.deltaY : event.deltaX, sideways ? 0 : event.deltaY);
    }
    changed();
  }, { passive: false });

  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    if (pointers.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const other = [...pointers.values()].find((each) => each.pointerId !== event.pointerId);
    const [x, y] = [event.offsetX - before.offsetX, event.offsetY - before.offsetY];
    if (other) {
      const apart = (one) => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY);
      const [midX, midY] = [event.offsetX + other.offsetX, event.offsetY + other.offsetY];
      camera.zoom(apart(event) / Math.max(1, apart(before)), midX / 2, midY / 2);
      moved = Infinity;
    } else {
      camera.move(-x, -y);
      moved += Math.abs(x) + Math.abs(y);
    }
    pointers.set(event.pointerId, event);
    changed();
  });
  const ended = (event) => {
    const known = pointers.delete(event.pointerId);
    const still = moved < 6 && !pointers.size;
    if (known && still && event.type === "pointerup") clicked(event.offsetX, event.offsetY);
  };
  canvas.addEventListener("pointerup", ended);
  canvas.addEventListener("pointercancel", ended);

  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: -80, ArrowDown: 80 };
    if (event.key in steps) camera.move(0, steps[event.key]);
    else if (event.key === "+" || event.key === "-") camera.zoom(event.key === "+" ? 1.25 : 0.8);
    else return;
    event.preventDefault();
    changed();
  });
}
