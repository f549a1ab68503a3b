// Browsers start no worker from the file system, where search needs one: there its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inside = frame.contentWindow;
      const give = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = () => {};
      this.postMessage = data => waiting.push(data);
      const script = inside.document.createElement("script");
      script.src = new URL(url, location.href).href;
      script.onload = () => {
        this.postMessage = give;
        waiting.splice(0).forEach(give);
      };
      inside.document.documentElement.append(script);
    }
    terminate() {}
  };
}
