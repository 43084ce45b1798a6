// Images and videos: taken from a drop, a paste or a button, shown, and sent as data: URIs.

const MOST = 20e6; // bytes of one file; the server bounds the whole request

// What a message keeps of a file: {name, type, url}, url being its data: URI.
function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, type: file.type, url: reader.result });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// The files as attachments. refuse(message) is called for each that cannot be one.
export async function readFiles(files, refuse) {
  const taken = [];
  for (const file of files) {
    if (!/^(image|video)\//.test(file.type)) refuse(`${file.name} is neither an image nor a video.`);
    else if (file.size > MOST) refuse(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most 20 can be sent.`);
    else await read(file).then((item) => taken.push(item), () => refuse(`${file.name} cannot be read.`));
  }
  return taken;
}

// The files of a paste. The text goes before its picture, as a spreadsheet gives both of its cells; but Finder gives the
// files' names as text.
export function pastedFiles(data) {
  const files = [...data.files];
  const [text] = data.getData("text/plain").trim().split(/[\r\n]/);
  return files.some(({ name }) => name.startsWith(text)) ? files : [];
}

// A part of a message, as the API takes it.
export function mediaPart({ type, url }) {
  const kind = type.startsWith("video/") ? "video_url" : "image_url";
  return { type: kind, [kind]: { url } };
}

// An attachment as an element; its name where the browser cannot show it.
export function preview({ name, type, url }) {
  const video = type.startsWith("video/");
  const shown = document.createElement(video ? "video" : "img");
  if (video) Object.assign(shown, { controls: true, muted: true });
  else shown.alt = name;
  shown.src = url;
  shown.addEventListener("error", () => {
    const text = document.createElement("span");
    text.className = "file";
    text.textContent = name;
    shown.replaceWith(text);
  });
  return shown;
}

// The attachments of the message that is being written.
export class Attachments {
  constructor(list, refuse) {
    this.list = list;
    this.refuse = refuse;
    this.items = [];
    this.reading = Promise.resolve(); // until all that was given is among the items
  }

  add(files) {
    this.reading = this.reading.then(async () => {
      const read = await readFiles(files, this.refuse);
      this.items.push(...read);
      this.show();
    });
    return this.reading;
  }

  // Hand the attachments over.
  take() {
    const taken = this.items;
    this.items = [];
    this.show();
    return taken;
  }

  show() {
    this.list.replaceChildren(...this.items.map((item) => this.element(item)));
  }

  element(item) {
    const element = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.addEventListener("click", () => {
      this.items = this.items.filter((other) => other !== item);
      this.show();
      document.querySelector("#prompt").focus();
    });
    element.append(preview(item), remove);
    return element;
  }
}
