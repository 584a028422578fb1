// Lists of which only the rows in view are elements.
"use strict";

class VirtualList {
  /** `draw(index)` makes the element of a row. */
  constructor(scroller, rowHeight, draw) {
    this.scroller = scroller;
    this.rowHeight = rowHeight;
    this.draw = draw;
    this.count = 0;
    this.inner = element("div", "rows");
    scroller.replaceChildren(this.inner);
    scroller.addEventListener("scroll", () => this.render());
    new ResizeObserver(() => this.render()).observe(scroller);
  }

  /** `wider`: by how many pixels the rows are wider than what is seen of them. */
  show(count, { keepPlace = false, wider = 0 } = {}) {
    this.count = count;
    this.inner.style.width = `calc(100% + ${wider}px)`;
    this.inner.style.height = `${count * this.rowHeight}px`;
    if (!keepPlace) this.scroller.scrollTop = 0;
    this.render();
  }

  reveal(index) {
    const top = index * this.rowHeight;
    const { scrollTop, clientHeight } = this.scroller;
    if (top < scrollTop || top + this.rowHeight > scrollTop + clientHeight) {
      this.scroller.scrollTop = top - clientHeight / 2;
    }
    this.render();
  }

  render() {
    const { scrollTop, scrollLeft, clientHeight, clientWidth } = this.scroller;
    if (!clientHeight) return; // another tab is shown
    // Rows stay where they are, and what is in their columns moves.
    this.inner.style.setProperty("--shift", scrollLeft);
    const first = Math.max(0, Math.floor(scrollTop / this.rowHeight) - 8);
    const last = Math.min(this.count, Math.ceil((scrollTop + clientHeight) / this.rowHeight) + 8);
    const rows = [];
    for (let index = first; index < last; index++) {
      const row = this.draw(index);
      row.style.top = `${index * this.rowHeight}px`;
      row.style.height = `${this.rowHeight}px`;
      row.style.left = `${scrollLeft}px`;
      row.style.width = `${clientWidth}px`;
      rows.push(row);
    }
    this.inner.replaceChildren(...rows);
  }
}
