// Browsers start no worker for a page that is opened from disk, and the search of the site is one.
// Such a page runs the worker's script in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const base = new URL(url, location)
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      const load = (path) => new Promise((done) => {
        const script = frame.contentDocument.createElement("script")
        script.src = new URL(path, base)
        script.onload = done
        frame.contentDocument.body.append(script)
      })

      // What the script sends goes to the page, and the other way round.
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...paths) => paths.reduce((before, path) => before.then(() => load(path)), Promise.resolve())
      const ready = load(base)
      this.postMessage = (data) => ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
  }
}
